# SPDX-License-Identifier: Apache-2.0
"""What a registration names, well formed and not."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmonitor.wire import selectors
from kmonitor.wire.errors import BadSelectorError

pytestmark = pytest.mark.wheel_ok

glob_text = st.text(alphabet="ab*?[]!^", max_size=12)  # no range: one may be backwards


@pytest.mark.parametrize("glob", ["*", "web-*", "web-[0-9]", "[]]", "[!]]", "[!a]b", "a]", "[[]", "db-?", "[a][b]"])
def test_good_globs(glob: str) -> None:
    assert selectors.check_glob(glob, "node") == glob


@pytest.mark.parametrize("glob", ["", "[", "web-[", "[]", "[!]", "[!", "web-[0-9", "[a][", "a\0b", "x" * 256, "[b-a]", "x[9-0]*", "\udcff"])
def test_malformed_globs(glob: str) -> None:
    with pytest.raises(BadSelectorError):
        selectors.check_glob(glob, "node")


def brackets_close(glob: str) -> bool:
    """Character by character: whether every '[' begins a set that ends."""
    at = 0
    while at < len(glob):
        if glob[at] == "[":
            at += 1
            if glob[at : at + 1] == "!":
                at += 1
            at += 1  # the first of the set stands for itself, even a ']'
            while at < len(glob) and glob[at] != "]":
                at += 1
            if at >= len(glob):
                return False
        at += 1
    return True


@given(glob_text.filter(bool))
def test_a_glob_is_refused_just_when_a_bracket_stays_open(glob: str) -> None:
    if brackets_close(glob):
        assert selectors.check_glob(glob, "node") == glob
    else:
        with pytest.raises(BadSelectorError, match="not closed"):
            selectors.check_glob(glob, "node")


@pytest.mark.parametrize(
    "glob",
    [
        "elasticsearch-m",
        "elasticsearch*",
        "*elasticsearch*",
        "?" * 15,
        "[ab]" * 15 + "*",
        "[]]" * 15,
        "[!]]" * 15,
        "ä" * 7 + "?",
        "\ufffd" * 15,
    ],
)
def test_comms_that_can_match(glob: str) -> None:
    assert selectors.check_comm(glob) == glob


@pytest.mark.parametrize(
    ("glob", "least"),
    [
        ("elasticsearch-main", 18),
        ("elasticsearch-ma*", 16),
        ("?" * 16, 16),
        ("[ab]" * 16, 16),
        ("[!]]" * 16, 16),
        ("ä" * 8, 16),
        ("*ä" * 8, 16),
    ],
)
def test_comms_that_are_longer_than_the_kernel_keeps(glob: str, least: int) -> None:
    with pytest.raises(BadSelectorError, match=f"it takes {least} bytes, and the kernel keeps 15"):
        selectors.check_comm(glob)


def test_what_to_write_for_a_long_comm() -> None:
    with pytest.raises(BadSelectorError, match=r"; write 'elasticsearch-m', or a glob$"):
        selectors.check_comm("elasticsearch-main")


def as_glob(letter: str, how: str) -> str:
    """What matches a letter."""
    if how in "?*" or letter == "!":
        return how if how in "?*" else "?"
    return f"[{letter}]" if how == "set" or letter in "*?[" else letter


@given(st.binary(min_size=1, max_size=15).filter(lambda name: b"\0" not in name), st.data())
def test_no_glob_is_refused_that_matches_a_name(comm: bytes, data: st.DataObject) -> None:
    """Made from any name that a process can have, as text: letter by letter as itself, as a set, or as a wildcard."""
    name = comm.decode(errors="replace")
    letters = data.draw(st.lists(st.sampled_from(("itself", "set", "?", "*")), min_size=len(name), max_size=len(name)))
    glob = "".join(as_glob(letter, how) for letter, how in zip(name, letters, strict=True))
    assert fnmatch.fnmatchcase(name, glob)
    assert selectors.check_comm(glob) == glob


@pytest.mark.parametrize("name", ["a", "web-1", "node.example.org", "A_b", "x" * 253])
def test_good_node_names(name: str) -> None:
    assert selectors.check_node_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "a-", ".a", "a b", "a\n", "a/b", "é", "x" * 254])
def test_malformed_node_names(name: str) -> None:
    with pytest.raises(BadSelectorError):
        selectors.check_node_name(name)


def test_a_node_selector_is_names_globs_and_labels() -> None:
    selectors.check_node_selector(["web-1", "db-*"], {"rack": "3", "example.org/role": "any text"})
    malformed: list[tuple[list[str], dict[str, str]]] = [(["web-["], {}), (["a b"], {}), ([], {"": "x"}), ([], {"a b": "x"})]
    for names, labels in malformed:
        with pytest.raises(BadSelectorError):
            selectors.check_node_selector(names, labels)


@given(st.text("ab-", min_size=1, max_size=6), st.lists(glob_text, max_size=3))
def test_a_node_is_selected_by_any_of_the_names(name: str, names: list[str]) -> None:
    assert selectors.node_matches(name, {}, names, {}) == (not names or any(fnmatch.fnmatchcase(name, glob) for glob in names))


def test_a_node_is_selected_with_all_of_the_labels() -> None:
    has = {"rack": "3", "role": "db"}
    assert selectors.node_matches("n", has, [], {"rack": "3"})
    assert selectors.node_matches("n", has, ["n"], {"rack": "3", "role": "db"})
    assert not selectors.node_matches("n", has, [], {"rack": "3", "role": "web"})
    assert not selectors.node_matches("n", has, [], {"zone": "3"})
    assert not selectors.node_matches("n", has, ["m"], {"rack": "3"})


@given(st.integers(-10, selectors.PID_MAX + 10))
def test_pids(pid: int) -> None:
    if 1 <= pid <= selectors.PID_MAX:
        assert selectors.check_pid(pid) == pid
    else:
        with pytest.raises(BadSelectorError):
            selectors.check_pid(pid)


@pytest.mark.parametrize(
    ("path", "clean"), [("/", "/"), ("/a/b", "/a/b"), ("//a///b/", "/a/b"), ("/system.slice/nginx.service", "/system.slice/nginx.service")]
)
def test_good_cgroup_paths(path: str, clean: str) -> None:
    assert selectors.check_cgroup_path(path) == clean
    assert selectors.check_cgroup_path(clean) == clean


@pytest.mark.parametrize("path", ["", "a", "a/b", "/a/../b", "/..", "/a\0b", "/" + "x" * 4096])
def test_malformed_cgroup_paths(path: str) -> None:
    with pytest.raises(BadSelectorError):
        selectors.check_cgroup_path(path)


@pytest.mark.parametrize("path", ["/x", "/run/nginx.pid", "/var/run/../run/a b.pid", "/é", "/" + "x" * 4095])
def test_good_pidfiles(path: str) -> None:
    assert selectors.check_pidfile(path) == path


@pytest.mark.parametrize("path", ["", "x.pid", "./x.pid", "~/x.pid", "/a\0b", "/" + "x" * 4096, "/" + "é" * 2048, "/\udc80"])
def test_malformed_pidfiles(path: str) -> None:
    with pytest.raises(BadSelectorError, match=r"^pidfile '.{0,200}$"):
        selectors.check_pidfile(path)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("nginx", "nginx.service"),
        ("getty@tty1", "getty@tty1.service"),
        ("a.slice", "a.slice"),
        (r"dev-disk\x2d1.swap", r"dev-disk\x2d1.swap"),
    ],
)
def test_good_unit_names(name: str, full: str) -> None:
    assert selectors.check_unit_name(name) == full


@pytest.mark.parametrize("name", ["", "a b", "a/b.service", ".service", "x.timer", "nginx.service\n", "a.b"])
def test_malformed_unit_names(name: str) -> None:
    with pytest.raises(BadSelectorError):
        selectors.check_unit_name(name)
