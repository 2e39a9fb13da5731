# SPDX-License-Identifier: Apache-2.0
"""A stock gRPC client of another language, which knows no more of us than the .proto files, hears of real processes."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.interop.conftest import JavaScript
from tests.lab.services import Lab

EXIT = 0x40
ENDS = 0x50

pytestmark = pytest.mark.capture

Start = Callable[..., JavaScript]


def registration(node: str, pid: int, mask: int) -> dict[str, Any]:
    """A kmonitor.v1.Registration."""
    return {"nodes": {"names": [node]}, "target": {"process": {"pid": pid}}, "event_mask": mask}


def test_subscribe_tells_of_an_exit(lab: Lab, service: tuple[str, str], javascript: Start) -> None:
    address, node = service
    process = lab.command("sh", "-c", "read line; exit 7")
    client = javascript("subscribe.mjs", address, json.dumps([registration(node, process.pid, EXIT)]))

    registered = client.wait_for("registered")["registered"]
    assert registered["node"] == node
    assert registered["state"] == "REGISTRATION_STATE_RUNNING"
    assert registered["process"]["pid"] == process.pid
    assert registered["process"]["comm"] == "sh"

    process.say("go")
    batch = client.wait_for("events")["events"]
    assert process.wait() == 7
    assert batch["node"] == node
    [event] = batch["events"]
    assert event["type"] == "EVENT_TYPE_PROCESS_EXIT"
    assert (event["pid"], event["tid"]) == (process.pid, process.pid)
    assert event["start_time"] == registered["process"]["start_time"]
    assert int(event["time"]) > int(event["start_time"]) > 0
    assert event["exit_code"] == 7
    assert "exit_signal" not in event


def test_subscribe_tells_of_a_death_by_signal(lab: Lab, service: tuple[str, str], javascript: Start) -> None:
    address, node = service
    process, other = lab.command("cat"), lab.command("cat")
    client = javascript("subscribe.mjs", address, json.dumps([registration(node, pid, ENDS) for pid in (process.pid, other.pid)]))
    answers = [client.wait_for("registered", number)["registered"] for number in (1, 2)]
    assert {answer["process"]["pid"] for answer in answers} == {process.pid, other.pid}
    assert {answer["state"] for answer in answers} == {"REGISTRATION_STATE_RUNNING"}

    process.send(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    other.close_input()
    assert other.wait() == 0

    def is_end_of_other(line: bytes) -> bool:
        batch = json.loads(line).get("events", {}).get("events", [])
        return any(event["pid"] == other.pid for event in batch)

    client.wait_line(is_end_of_other, "the end of the second process")
    events = [event for item in client.notifications if item["kind"] == "events" for event in item["events"]["events"]]
    assert [(event["pid"], event["type"]) for event in events] == [
        (process.pid, "EVENT_TYPE_PROCESS_ABORT"),
        (process.pid, "EVENT_TYPE_PROCESS_EXIT"),
        (other.pid, "EVENT_TYPE_PROCESS_EXIT"),
    ]
    for event in events[:2]:
        assert event["exit_signal"] == signal.SIGTERM
        assert "exit_code" not in event


def test_cancelling_ends_the_registration(lab: Lab, service: tuple[str, str], javascript: Start) -> None:
    address, node = service

    def watched() -> tuple[int, int]:
        [line] = lab.json_lines("nodes", "--json", "--broker", address)
        return line["watched_processes"], line["node_mask"]

    client = javascript("subscribe.mjs", address, json.dumps([registration(node, lab.command("cat").pid, EXIT)]))
    client.wait_for("registered")
    assert watched() == (1, 0)
    client.close_input()
    assert client.wait_status()[0] == "CANCELLED"
    # The broker hears of it after the client; asking takes longer than that.
    until = time.monotonic() + 20
    while watched() != (0, 0):
        assert time.monotonic() < until, "still watched after the stream's end"


@pytest.mark.parametrize(("mask", "word"), [(0, "empty"), (0x80, "unknown bits 0x80")])
def test_an_invalid_mask_is_refused(service: tuple[str, str], javascript: Start, mask: int, word: str) -> None:
    address, node = service
    client = javascript("subscribe.mjs", address, json.dumps([registration(node, 1, mask)]))
    status, details = client.wait_status()
    assert status == "INVALID_ARGUMENT"
    assert word in details


def test_watch_registers_and_deregisters(lab: Lab, service: tuple[str, str], javascript: Start) -> None:
    address, node = service
    first, second = lab.command("cat"), lab.command("cat")
    client = javascript("watch.mjs", address)
    client.say(json.dumps({"request_id": 11, "register": {"registration": registration(node, first.pid, ENDS)}}))
    client.say(json.dumps({"request_id": 12, "register": {"registration": registration(node, second.pid, EXIT)}}))
    for number in (1, 2):
        answer = client.wait_for("registered", number)["registered"]
        assert (answer["request_id"], answer["state"]) in {("11", "REGISTRATION_STATE_RUNNING"), ("12", "REGISTRATION_STATE_RUNNING")}

    client.say(json.dumps({"request_id": 13, "deregister": {"registration": registration(node, first.pid, EXIT)}}))
    answer = client.wait_for("deregistered", 1)["deregistered"]
    assert (answer["request_id"], answer["registration_id"], answer["event_mask"]) == ("13", "11", ENDS & ~EXIT)
    client.say(json.dumps({"request_id": 14, "deregister": {"registration": registration(node, first.pid, ENDS)}}))
    answer = client.wait_for("deregistered", 2)["deregistered"]
    assert (answer["request_id"], answer.get("event_mask", 0), "error" in answer) == ("14", 0, False)
    client.say(json.dumps({"request_id": 15, "deregister": {"registration": registration(node, first.pid, ENDS)}}))
    answer = client.wait_for("deregistered", 3)["deregistered"]
    assert answer["error"]["code"] == 5  # NOT_FOUND

    first.send(signal.SIGKILL)
    first.wait()
    second.close_input()
    second.wait()
    [event] = client.wait_for("events")["events"]["events"]
    assert (event["pid"], event["type"], event["exit_code"]) == (second.pid, "EVENT_TYPE_PROCESS_EXIT", 0)
    client.close_input()
    assert client.wait_status()[0] == "CANCELLED"
