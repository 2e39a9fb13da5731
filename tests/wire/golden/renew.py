# SPDX-License-Identifier: Apache-2.0
"""Writes the golden records anew, from this machine's kernel: see README.md. Needs root."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path

import numpy as np

from kmonitor.agent.interest import InterestTable
from kmonitor.agent.probe import ProbeOptions
from kmonitor.agent.source import Source
from kmonitor.agent.sources import start
from kmonitor.v1 import agent_pb2
from kmonitor.wire.masks import EventType
from kmonitor.wire.record import RING_DISCARD, SLOT_DTYPE, check_records, slots_of
from tests.lab.memory_cgroup import memory_cgroup
from tests.lab.workload import Root, build
from tests.wire.golden.stretches import HERE, Stretch, decode

ALL = 0x7F
SCENES = {
    "each-type": ("mixed",),
    "threads-killed": ("thread_abort", "9"),
    "exec": ("exec",),
    "exec-too-long": ("exec_long",),
    "codes": ("codes", "0", "255"),
    "by-the-kernel": ("killed", "terminal"),
}


def play(source: Source, truth: Path, folder: str, *scene: str) -> tuple[int, bytes]:
    """A scene of tests/workload/truth.c: the position and the bytes of the ring that it and all that came from it made."""
    root = Root([truth, *scene], Path(folder))
    root.wait_ready()
    want = agent_pb2.Interest.ProcessInterest(pid=root.pid, event_mask=ALL, follow=True, look_up=True)
    asyncio.run(InterestTable(source).apply(agent_pb2.Interest(version=1, processes=[want])))
    root.say("go")
    root.truth()
    root.stop()
    position = source.ring.position
    data = bytes(source.ring.read(1 << 20) or b"")
    assert data is not None
    source.ring.release(source.ring.position)
    return position, data


def without_one(data: bytes) -> bytes:
    """With the second record marked as one that was discarded: the probe itself commits all that it reserves."""
    slots = np.frombuffer(bytearray(data), dtype=SLOT_DTYPE)
    slots["ring_length"][check_records(slots_of(data))[1]] |= RING_DISCARD
    return slots.tobytes()


def main() -> None:
    """Overwrite all of them."""
    for old in (*HERE.glob("*.bin"), *HERE.glob("*.json")):
        old.unlink()
    captured: dict[str, tuple[int, bytes]] = {}
    source = start("core", ProbeOptions(ring_bytes=1 << 20), None)
    with tempfile.TemporaryDirectory() as folder:
        truth = build(Path(folder)).truth
        for name, scene in SCENES.items():
            captured[name] = play(source, truth, folder, *scene)
        with memory_cgroup(32 << 20) as procs:
            captured["out-of-memory"] = play(source, truth, folder, "oom", str(procs))
    source.close()
    position, data = captured["each-type"]
    captured["discarded-record"] = (position, without_one(data))
    for name, (position, data) in captured.items():
        stretch = Stretch(position=position, epoch=1, boottime_to_unix_ns=1_700_000_000_000_000_000, data=data)
        told = {"position": stretch.position, "epoch": stretch.epoch, "boottime_to_unix_ns": stretch.boottime_to_unix_ns}
        Path(HERE, f"{name}.bin").write_bytes(data)
        lines = ",\n".join(json.dumps(line, separators=(",", ":")) for line in decode(stretch))
        Path(HERE, f"{name}.json").write_text(f'{{"stretch":{json.dumps(told)},"events":[\n{lines}\n]}}\n', encoding="utf-8")
        types = sorted({EventType(int(kind)).name or "" for kind in slots_of(data)["type"][check_records(slots_of(data))]})
        print(f"{name}: {len(data)} bytes, {' '.join(types)}")


if __name__ == "__main__":
    main()
