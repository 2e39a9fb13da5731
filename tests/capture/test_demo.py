# SPDX-License-Identifier: Apache-2.0
"""`kmon up --demo`: what it promises to show comes, from real processes, and it ends by itself."""

from __future__ import annotations

import json
import signal

from tests.lab.requires import capture_lack, need
from tests.lab.services import Lab


def test_every_kind_of_end(lab: Lab) -> None:
    """A success, a failure, a crash, a kill with its sender, and, where a small group can be had, one without memory."""
    need(capture_lack)
    done = lab.run("kmon", "up", "--demo", "--json", "--for", "50s", limit=60)
    assert done.code == 0, done
    events = [line for line in map(json.loads, done.stdout.splitlines()) if line["kind"] == "event"]
    ends = [line for line in events if line["type"] == "PROCESS_EXIT"]
    assert {0, 3} <= {line["exit_code"] for line in ends}
    (crash,) = (line for line in ends if line["exit_signal"] == signal.SIGSEGV)
    assert crash["killed_by"] == {"pid": 0, "comm": "", "uid": 0}
    (killed,) = (line for line in ends if line["exit_signal"] == signal.SIGTERM)
    root = events[0]["pid"]
    assert (killed["killed_by"]["pid"], killed["ppid"]) == (root, root)
    promised = "one that runs out of memory" in done.stderr
    assert [line["oom_killed"] for line in ends if line["exit_signal"] == signal.SIGKILL] == ([True] if promised else [])
    assert f"that was {len(events)} events" in done.stderr
    assert "none missing" in done.stderr
    assert ends[-1]["pid"] == root
