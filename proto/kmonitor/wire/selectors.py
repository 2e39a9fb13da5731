# SPDX-License-Identifier: Apache-2.0
"""What a registration names: nodes, processes, control groups, units. Checked alike in client and broker."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping

from kmonitor.wire.errors import BadSelectorError, UsageError

DEFAULT_ADDRESS = "127.0.0.1:7221"
"""Where the broker listens, and is looked for."""

PID_MAX = 4_194_304  # PID_MAX_LIMIT of include/linux/threads.h on 64-bit machines
_PATH_MAX = 4096  # include/uapi/linux/limits.h
_NODE_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_PINNED_NAME_MAX = 240
"""Bytes of a node's name in that of its folder of pins (kmonitor.agent.pins), which may have 255: there a dot takes three."""
_BOOT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_UNIT_NAME = re.compile(r"[A-Za-z0-9:_.\\@-]{1,255}\.(service|scope|slice|socket|mount|swap)")
_LABEL_KEY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,62})?")
_GLOB = re.compile(r"[*?\[]")
GLOBS_MOST = 64
"""In one list of a request."""
GLOBS_LENGTH = 1024
"""Characters of all of them together: matching the worst of them takes 20 us a name."""
LABELS_MOST = 64
"""Of one node."""
_LABEL_VALUE_MAX = 255
COMM_MOST = 15
"""Bytes of a process's name: TASK_COMM_LEN of include/linux/sched.h without the NUL."""


def is_glob(text: str) -> bool:
    """Whether `text` has any of the characters that make it a pattern."""
    return _GLOB.search(text) is not None


def check_glob(text: str, what: str) -> str:
    """Return `text`, or raise BadSelectorError if it cannot match as meant: empty, or a bracket left open."""
    if not text:
        raise BadSelectorError(f"an empty glob for {what} matches nothing: leave it out, or write *")
    if "\0" in text or len(text) > 255:
        raise BadSelectorError(f"glob for {what} is longer than 255 characters or holds a NUL")
    at = 0
    while (start := text.find("[", at)) >= 0:
        first = start + 2 if text[start + 1 : start + 2] == "!" else start + 1
        end = text.find("]", first + 1)
        if end < 0:
            raise BadSelectorError(f"malformed glob {text!r} for {what}: '[' at character {start + 1} is not closed")
        at = end + 1
    if "(?!)" in fnmatch.translate(text):  # what re.escape would not leave like this
        raise BadSelectorError(f"glob {text!r} for {what} matches nothing: a range in it goes backwards")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadSelectorError(f"glob {text!r} for {what}: what is not UTF-8 cannot be sent") from None
    return text


def check_globs(texts: Iterable[str], what: str) -> None:
    """Raise BadSelectorError if there are more globs among these names than are matched in a moment."""
    globs = [text for text in texts if is_glob(text)]
    length = sum(map(len, globs))
    if len(globs) > GLOBS_MOST or length > GLOBS_LENGTH:
        raise BadSelectorError(
            f"{len(globs)} globs for {what}, {length} characters: at most {GLOBS_MOST}, and {GLOBS_LENGTH} characters together"
        )


class Globs:
    """Some names and globs, compiled."""

    __slots__ = ("_exact", "_pattern")

    def __init__(self, texts: Iterable[str]) -> None:
        texts = list(texts)
        globs = [text for text in texts if is_glob(text)]
        self._exact = frozenset(texts).difference(globs)
        self._pattern = re.compile("|".join(map(fnmatch.translate, globs))) if globs else None

    def match(self, text: str) -> bool:
        """Whether any of them does; case-sensitive."""
        return text in self._exact or (self._pattern is not None and self._pattern.match(text) is not None)


def check_comm(glob: str) -> str:
    """Return a glob for names of processes, or raise BadSelectorError if the kernel keeps no name long enough to match it."""
    check_glob(glob, "comm")
    if (least := _fewest_bytes(glob)) > COMM_MOST:
        kept = glob.encode()[:COMM_MOST].decode(errors="ignore")
        raise BadSelectorError(
            f"comm {glob!r} matches nothing: it takes {least} bytes, and the kernel keeps {COMM_MOST} of a process's name; "
            + (f"write a glob for what is kept, at most {COMM_MOST} bytes" if is_glob(glob) else f"write {kept!r}, or a glob")
        )
    return glob


def _fewest_bytes(glob: str) -> int:
    """Return the length of the shortest name, in bytes of UTF-8, that a well-formed glob can match; not more than that."""
    simple = re.sub(r"\[!?.[^]]*\]", "?", glob, flags=re.DOTALL).replace("*", "")
    # A name that was cut within a character, or is no UTF-8, has U+FFFD where one byte was.
    return len(simple.replace("\ufffd", "?").encode())


def check_node_name(name: str) -> str:
    """Return `name`, or raise BadSelectorError if no node can be called so (letters, digits, . _ -; at most 253)."""
    if not _NODE_NAME.fullmatch(name):
        raise BadSelectorError(
            f"{_short(name)} cannot be a node's name: use letters, digits, '.', '_' and '-', starting and ending with a letter or digit"
        )
    return name


def check_agent_name(name: str) -> str:
    """Return the node's name of an agent, or raise BadSelectorError if no node can be called so, or none that is pinned."""
    check_node_name(name)
    if len(name) + 2 * name.count(".") > _PINNED_NAME_MAX:
        raise BadSelectorError(f"{_short(name)} cannot be a node's name: at most {_PINNED_NAME_MAX} characters, each dot counting as three")
    return name


def check_node_selector(names: Iterable[str], labels: Mapping[str, str]) -> None:
    """Raise BadSelectorError for a malformed name, glob or label key."""
    names = list(names)
    check_globs(names, "node")
    for name in names:
        if is_glob(name):
            check_glob(name, "node")
        else:
            check_node_name(name)
    check_labels(labels)


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise BadSelectorError unless a node can have these labels."""
    if len(labels) > LABELS_MOST:
        raise BadSelectorError(f"{len(labels)} labels: at most {LABELS_MOST}")
    for key, value in labels.items():
        check_label_key(key)
        if len(value) > _LABEL_VALUE_MAX or not value.isprintable():
            raise BadSelectorError(f"label {key}={_short(value)}: a value has at most {_LABEL_VALUE_MAX} printable characters")


def check_label_key(key: str) -> str:
    """Return `key`, or raise BadSelectorError if no label can be called so."""
    if not _LABEL_KEY.fullmatch(key):
        raise BadSelectorError(f"{_short(key)} cannot be a label's name: use letters, digits, '.', '_', '/' and '-', at most 63")
    return key


def check_boot_id(boot_id: str) -> str:
    """Return `boot_id`, or raise BadSelectorError if it cannot be one: letters, digits, . _ : -, at most 128.

    Linux's is a UUID, but nothing here depends on that.
    """
    if not _BOOT_ID.fullmatch(boot_id):
        raise BadSelectorError(f"{_short(boot_id)} is no boot id: give it as `kmon ps --json` and `kmon nodes --json` show it")
    return boot_id


def check_uid(uid: int) -> int:
    """Return `uid`, or raise BadSelectorError if no user can have it."""
    if not 0 <= uid < 1 << 32:
        raise BadSelectorError(f"uid {uid} is no user's: give a number from 0 to 4294967295")
    return uid


def check_address(address: str) -> str:
    """Return HOST:PORT, or raise UsageError. Square brackets go around an IPv6 host."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"{address!r} is no broker address: write HOST:PORT, such as {DEFAULT_ADDRESS}")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise UsageError(f"{address!r}: write an IPv6 host in brackets, such as [::1]:7221")
    return address


def node_matches(name: str, node_labels: Mapping[str, str], names: Iterable[str], labels: Mapping[str, str]) -> bool:
    """Whether a node is selected: by any of `names` (none is all), and with all of `labels`."""
    names = list(names)
    return (not names or Globs(names).match(name)) and has_labels(node_labels, labels.items())


def has_labels(node_labels: Mapping[str, str], labels: Iterable[tuple[str, str]]) -> bool:
    """Whether a node has all of these labels."""
    return all(node_labels.get(key) == value for key, value in labels)


def check_pid(pid: int) -> int:
    """Return `pid`, or raise BadSelectorError if no process can have it."""
    if pid <= 0:
        raise BadSelectorError(f"pid {pid} names no process: give a number from 1")
    if pid > PID_MAX:
        raise BadSelectorError(f"pid {pid} is above {PID_MAX}, the highest that Linux gives")
    return pid


def check_cgroup_path(path: str) -> str:
    """Return the path below the hierarchy's root, or raise BadSelectorError."""
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise BadSelectorError(f"control group {path!r}: a path that is not UTF-8 cannot be sent") from None
    if not path.startswith("/") or "\0" in path or ".." in path.split("/") or size > _PATH_MAX:
        raise BadSelectorError(
            f"control group {path!r}: give its path below the root of the v2 hierarchy, such as /system.slice/nginx.service"
        )
    return "/" + "/".join(part for part in path.split("/") if part)


def check_pidfile(path: str) -> str:
    """Return the path of a file that holds a process id, or raise BadSelectorError unless it is absolute, and at most 4096 bytes long."""
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise BadSelectorError(f"pidfile {path!r}: a path that is not UTF-8 cannot be sent") from None
    if not path.startswith("/") or "\0" in path or size > _PATH_MAX:
        shown = path if len(path) <= 80 else path[:77] + "..."
        raise BadSelectorError(f"pidfile {shown!r}: give an absolute path of at most {_PATH_MAX} bytes, such as /run/nginx.pid")
    return path


def check_unit_name(name: str) -> str:
    """Return a unit's full name ("nginx" is "nginx.service", as systemctl takes it), or raise BadSelectorError."""
    full = name if "." in name else name + ".service"
    if not _UNIT_NAME.fullmatch(full):
        raise BadSelectorError(f"{name!r} is not the name of a systemd unit that has processes, such as nginx.service")
    return full


def _short(text: str) -> str:
    """Quote what somebody wrote, for an error that is one line."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
