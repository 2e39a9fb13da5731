# SPDX-License-Identifier: Apache-2.0
"""The C structs of the built probe against Python's view of them, through the object's own BTF."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kmonitor.agent import maps, probe
from kmonitor.agent.pins import PinFolder
from kmonitor.wire import record
from tests.agent.btf import Btf


@pytest.fixture(scope="module")
def btf() -> Btf:
    return Btf(Path(str(resources.files("kmonitor.agent").joinpath("kmonitor.bpf.o"))))


def _places(dtype: np.dtype[Any], shift: int = 0) -> dict[str, tuple[int, int]]:
    assert dtype.fields is not None
    return {name: (int(field[1]) - shift, field[0].itemsize) for name, field in dtype.fields.items()}


def test_record(btf: Btf) -> None:
    ours = _places(record.SLOT_DTYPE, record.RING_HEADER_SIZE)
    for name in ("ring_length", "ring_page"):
        ours.pop(name)
    theirs = btf.fields("kmonitor_record")
    assert theirs.pop("tail") == (record.RECORD_SIZE, 0)
    renamed = {
        name.replace("child.", "child_").replace("killer.", "killer_").replace("root.", "root_"): place for name, place in theirs.items()
    }
    assert renamed == ours
    assert btf.size("kmonitor_record") == record.RECORD_SIZE == record.SLOT_SIZE - record.RING_HEADER_SIZE


def test_control(btf: Btf) -> None:
    assert btf.fields("kmonitor_control") == _places(maps.CONTROL_DTYPE)
    assert btf.size("kmonitor_control") == maps.CONTROL_DTYPE.itemsize


def test_process(btf: Btf) -> None:
    assert btf.fields("kmonitor_process") == _places(maps.PROCESS_DTYPE)
    assert btf.size("kmonitor_process") == maps.PROCESS_DTYPE.itemsize


def test_watched(btf: Btf) -> None:
    assert btf.fields("kmonitor_watched") == {
        "start_boottime_ns": (0, 8), "mask": (8, 4), "flags": (12, 4),
        "root.start_boottime_ns": (16, 8), "root.tgid": (24, 4), "root.armed": (28, 4),
        "armed": (32, 4), "unused": (36, 4),
    }  # fmt: skip
    entry = maps.Watched(1 << 40, 0x7F, 1, maps.Root(1 << 41, 2, 3), 4)
    assert maps.Watched.unpack(entry.pack()) == entry
    assert btf.size("kmonitor_watched") == maps.WATCHED_SIZE


def test_config(btf: Btf) -> None:
    packed = maps.pack_config(pidns_inum=1, has_group_dead=True, victim_is_task=True, fill_mark=2, copies=3)
    assert btf.size("kmonitor_config") == len(packed)
    assert list(btf.fields("kmonitor_config")) == ["pidns_inum", "has_group_dead", "victim_is_task", "fill_mark", "copies"]


def test_what_is_fixed_for_ever(btf: Btf) -> None:
    """What an agent needs of a probe of any other version: bpf/kmonitor.h says why. A change here breaks upgrades."""
    control = btf.fields("kmonitor_control")
    fixed = {"any_mask": (0, 4), "sleeping": (8, 4), "epoch": (16, 8), "object_crc": (24, 4), "lost": (32, 128)}
    assert {name: control[name] for name in fixed} == fixed
    assert btf.fields("kmonitor_record")["version"] == (0, 1)
    assert (record.SLOT_SIZE, record.RING_HEADER_SIZE) == (128, 8)
    folder = PinFolder(Path("/root"), "a.node", "host", 7)
    assert folder.path == Path("/root/a%2enode@host@v7")
    assert {"events", "control"} <= set(probe.MAPS)


def test_gone(btf: Btf) -> None:
    packed = maps.pack_gone(1, 2, 3, 4, 5, 6, b"name")
    assert btf.size("kmonitor_gone") == len(packed)
    places = {"start_boottime_ns": 1, "cgroup_id": 2, "tgid": 3, "ppid": 4, "uid": 5, "gid": 6}
    fields = btf.fields("kmonitor_gone")
    assert {name: int.from_bytes(packed[fields[name][0] :][: fields[name][1]], "little") for name in places} == places
    assert packed[fields["comm"][0] :].rstrip(b"\0") == b"name"
