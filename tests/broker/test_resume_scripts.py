# SPDX-License-Identifier: Apache-2.0
"""Scripts with which the model of resume (test_resume_model.py) failed, or was wrong itself: each is played as it was found."""

from __future__ import annotations

from typing import Any

import pytest

from tests.broker.naive_monitor import wish
from tests.broker.test_resume_model import MemoryMachine, ResumeMachine, SmallMachine, SqliteMachine, _small

__all__ = ["_small"]

Step = tuple[str, dict[str, Any]]

TIMES = 3
"""A log in a file has a thread."""


def wishes(*wanted: tuple[int, dict[str, Any]]) -> list[Any]:
    return [wish(mask, **target) for mask, target in wanted]


SCRIPTS: dict[str, tuple[type[ResumeMachine], list[Step]]] = {
    "a ring that begins while a stream brings what it had": (
        MemoryMachine,
        [
            ("open", {"wanted": wishes((0x7F, {"pid": 3, "follow": True, "node": "a"}), (0x68, {})), "names_stream": True, "flows": True}),
            ("restart", {"crashes": False, "before": 0}),
            ("come_back", {"number": 0, "found": False, "at_once": False, "before": 0}),
            ("open", {"wanted": wishes((0x40, {"pid": 3})), "names_stream": True, "flows": True}),
            ("start_anew", {"which": 0, "reboot": False}),
        ],
    ),
    "... and the broker is started again": (
        MemoryMachine,
        [
            ("open", {"wanted": wishes((0x7F, {"follow": True, "node": "a"}), (0x40, {})), "names_stream": True, "flows": False}),
            ("restart_under_load", {"found": False}),
            ("start_anew", {"which": 0, "reboot": False}),
            ("open", {"wanted": wishes((0x40, {"pid": 2, "follow": True, "node": "a"})), "names_stream": True, "flows": True}),
            ("come_back", {"number": 0, "found": False, "at_once": True, "before": 1}),
        ],
    ),
    "an absence is told before what came behind it, though a stream still brings what it had": (
        SmallMachine,
        [
            (
                "open",
                {
                    "wanted": wishes((0x7F, {"pid": 1, "follow": True}), (0x40, {"pid": 2, "node": "a"}), (0x60, {"group": "/a"})),
                    "names_stream": True,
                    "flows": True,
                },
            ),
            ("burst", {"which": 0, "blocks": 2, "each": 2}),
            ("restart", {"crashes": False, "before": 0}),
            ("come_back", {"number": 0, "found": False, "at_once": False, "before": 0}),
            ("flow", {"which": 0}),
            ("request", {"number": 0, "count": 1}),
            ("burst", {"which": 0, "blocks": 1, "each": 1}),
            ("request", {"number": 0, "count": 1000}),
            ("restart", {"crashes": False, "before": 1}),
        ],
    ),
    "nobody had asked for anything: an empty absence, not taken by the second stream": (
        MemoryMachine,
        [
            ("open", {"wanted": wishes((0x7F, {})), "names_stream": True, "flows": True}),
            ("do", {"which": 0, "who": 0, "what": "exec", "lost": False}),
            ("flow", {"which": 0}),
            ("tick", {}),
            ("take", {"number": 0, "count": 1000}),
            ("go", {"number": 0, "before": 1000, "stays": False}),
            ("flow", {"which": 0}),
            ("do", {"which": 0, "who": 0, "what": "exec", "lost": False}),
            ("come_back", {"number": 0, "found": False, "at_once": True, "before": 0}),
            ("flow", {"which": 0}),
            ("go", {"number": 0, "before": 0, "stays": True}),
            ("come_back", {"number": 0, "found": False, "at_once": True, "before": 0}),
        ],
    ),
    "an absence, and then what retention took": (
        SmallMachine,
        [
            ("open", {"wanted": wishes((0x20, {})), "names_stream": True, "flows": True}),
            ("restart_under_load", {"found": False}),
            ("come_back", {"number": 0, "found": False, "at_once": True, "before": 0}),
            ("burst", {"which": 0, "blocks": 8, "each": 2}),
            ("go", {"number": 0, "before": 1, "stays": True}),
        ],
    ),
    "an absence in a ring of which the log has nothing": (
        SmallMachine,
        [
            ("open", {"wanted": wishes((0x60, {"group": "/a/b"})), "names_stream": False, "flows": True}),
            ("start_anew", {"which": 1, "reboot": False}),
            ("come_back", {"number": 0, "found": False, "at_once": True, "before": 0}),
            ("flow", {"which": 1}),
            ("take", {"number": 0, "count": 1000}),
            ("come_back", {"number": 0, "found": False, "at_once": True, "before": 0}),
        ],
    ),
    "... with the log in a file": (
        SqliteMachine,
        [
            ("open", {"wanted": wishes((0x68, {"pid": 2, "follow": True})), "names_stream": True, "flows": False}),
            ("flow", {"which": 1}),
            ("come_back", {"number": 0, "found": False, "at_once": True, "before": 1}),
            ("go", {"number": 0, "before": 0, "stays": False}),
            ("restart_under_load", {"found": False}),
            ("start_anew", {"which": 0, "reboot": False}),
            ("open", {"wanted": wishes((0x20, {"pid": 3, "node": "a"})), "names_stream": True, "flows": True}),
            ("restart_under_load", {"found": False}),
        ],
    ),
    "what a ring had before it was armed anew, and a cursor without a stream's id": (
        SqliteMachine,
        [
            ("open", {"wanted": wishes((0x40, {"follow": True})), "names_stream": False, "flows": True}),
            ("start_anew", {"which": 0, "reboot": False}),
            ("restart_under_load", {"found": False}),
            ("end_slowly", {"which": 0, "who": 0, "ticks": 0}),
            ("restart", {"crashes": True, "before": 0}),
        ],
    ),
    "a process of another boot, of a broker that knows nothing": (
        MemoryMachine,
        [
            ("open", {"wanted": wishes((0x68, {"pid": 1})), "names_stream": True, "flows": True}),
            ("restart_under_load", {"found": False}),
            ("deregister", {"number": 0, "which": 0}),
            ("start_anew", {"which": 0, "reboot": True}),
            ("restart", {"crashes": False, "before": 0}),
            ("restart_under_load", {"found": True}),
        ],
    ),
    "progress says no less than the cursor did": (
        SqliteMachine,
        [
            ("open", {"wanted": wishes((0x60, {"group": "/a/b"}), (0x7F, {"node": "a"})), "names_stream": True, "flows": True}),
            ("start_anew", {"which": 1, "reboot": False}),
            ("restart_under_load", {"found": False}),
            ("restart_under_load", {"found": False}),
            ("tick", {}),
            ("restart_under_load", {"found": False}),
        ],
    ),
    "somebody else's place that does not reach back, and one that does": (
        SqliteMachine,
        [
            (
                "open",
                {"wanted": wishes((0x20, {"pid": 2}), (0x60, {"group": "/c"}), (0x40, {"pid": 3})), "names_stream": False, "flows": True},
            ),
            ("start_anew", {"which": 0, "reboot": True}),
            ("restart_under_load", {"found": False}),
            ("restart_under_load", {"found": False}),
            ("restart", {"crashes": False, "before": 0}),
            ("come_back", {"number": 1, "found": False, "at_once": True, "before": 0}),
            ("come_back", {"number": 0, "found": False, "at_once": True, "before": 1}),
        ],
    ),
    "retention while two earlier streams of the monitor's linger: a mark": (
        SmallMachine,
        [
            ("end_slowly", {"which": 1, "who": 0, "ticks": 0}),
            (
                "open",
                {
                    "wanted": wishes((0x60, {"group": "/a"}), (0x60, {"group": "/c"}), (0x7F, {"group": "/a"})),
                    "names_stream": True,
                    "flows": True,
                },
            ),
            ("come_back", {"number": 0, "found": False, "at_once": False, "before": 0}),
            ("do", {"which": 1, "who": 0, "what": "exec", "lost": True}),
            ("go", {"number": 0, "before": 0, "stays": True}),
            ("open", {"wanted": wishes((0x48, {"pid": 1, "follow": True}), (0x68, {"pid": 2})), "names_stream": True, "flows": True}),
            ("burst", {"which": 0, "blocks": 6, "each": 4}),
        ],
    ),
    "... and rows": (
        SmallMachine,
        [
            (
                "open",
                {
                    "wanted": wishes((0x68, {"pid": 3, "node": "a"}), (0x48, {"pid": 2, "follow": True, "node": "a"})),
                    "names_stream": True,
                    "flows": True,
                },
            ),
            ("open", {"wanted": wishes((0x7F, {"pid": 2})), "names_stream": True, "flows": True}),
            ("open", {"wanted": wishes((0x40, {"follow": True})), "names_stream": True, "flows": True}),
            ("come_back", {"number": 0, "found": False, "at_once": False, "before": 0}),
            ("go", {"number": 0, "before": 0, "stays": True}),
            ("burst", {"which": 0, "blocks": 1, "each": 4}),
            ("burst", {"which": 1, "blocks": 8, "each": 2}),
        ],
    ),
    "what retention took before a stream came back, and what while it reads": (
        SmallMachine,
        [
            ("open", {"wanted": wishes((0x7F, {"group": "/a/b"}), (0x20, {"follow": True})), "names_stream": True, "flows": True}),
            ("burst", {"which": 0, "blocks": 5, "each": 5}),
            ("come_back", {"number": 0, "found": False, "at_once": True, "before": 0}),
            ("burst", {"which": 0, "blocks": 1, "each": 2}),
            ("come_back", {"number": 0, "found": False, "at_once": True, "before": 1}),
        ],
    ),
    "progress says nothing of a node of which an absence is still to be told": (
        SmallMachine,
        [
            ("open", {"wanted": wishes((0x7F, {"follow": True})), "names_stream": True, "flows": True}),
            ("go", {"number": 0, "before": 0, "stays": False}),
            ("burst", {"which": 1, "blocks": 1, "each": 1}),
            ("come_back", {"number": 0, "found": False, "at_once": True, "before": 0}),
            ("tick", {}),
            ("flow", {"which": 1}),
            ("go", {"number": 0, "before": 1, "stays": True}),
        ],
    ),
    "by number, without a stream's id": (
        SqliteMachine,
        [
            ("open", {"wanted": wishes((0x68, {"pid": 1}), (0x7F, {"pid": 3, "follow": True})), "names_stream": True, "flows": False}),
            ("go", {"number": 0, "before": 0, "stays": True}),
            ("open", {"wanted": wishes((0x48, {"pid": 2})), "names_stream": True, "flows": True}),
            ("burst", {"which": 0, "blocks": 2, "each": 4}),
            (
                "open",
                {
                    "wanted": wishes((0x68, {"pid": 3, "follow": True}), (0x7F, {"pid": 2, "follow": True, "node": "a"})),
                    "names_stream": False,
                    "flows": False,
                },
            ),
            ("flow", {"which": 1}),
            ("restart_under_load", {"found": False}),
        ],
    ),
    "a loss and a record where the client is, that retention took": (
        SmallMachine,
        [
            ("open", {"wanted": wishes((0x20, {}), (0x48, {"pid": 3})), "names_stream": True, "flows": True}),
            ("do", {"which": 1, "who": 0, "what": "exec", "lost": True}),
            ("end_slowly", {"which": 1, "who": 2, "ticks": 0}),
            ("burst", {"which": 0, "blocks": 5, "each": 6}),
            ("go", {"number": 0, "before": 0, "stays": True}),
        ],
    ),
    "by number, and nothing was taken of one node": (
        SqliteMachine,
        [
            ("open", {"wanted": wishes((0x68, {"pid": 1}), (0x48, {"follow": True, "node": "a"})), "names_stream": False, "flows": False}),
            ("read", {"which": 0}),
            ("do", {"which": 0, "who": 0, "what": "exec", "lost": False}),
            ("do", {"which": 0, "who": 0, "what": "fork", "lost": False}),
            ("open", {"wanted": wishes((0x7F, {"group": "/a"})), "names_stream": True, "flows": True}),
            ("come_back", {"number": 0, "found": False, "at_once": True, "before": 1}),
            ("restart", {"crashes": False, "before": 3}),
        ],
    ),
    "progress after an answer from a later ring": (
        SqliteMachine,
        [
            ("open", {"wanted": wishes((0x48, {})), "names_stream": True, "flows": True}),
            ("tick", {}),
            ("end_slowly", {"which": 0, "who": 0, "ticks": 0}),
            ("open", {"wanted": wishes((0x7F, {"group": "/a"})), "names_stream": True, "flows": False}),
            ("start_anew", {"which": 0, "reboot": False}),
            ("restart_under_load", {"found": False}),
            ("burst", {"which": 1, "blocks": 4, "each": 1}),
            ("end_slowly", {"which": 0, "who": 0, "ticks": 0}),
        ],
    ),
    "a mark from before it came, that retention took": (
        SmallMachine,
        [
            ("open", {"wanted": wishes((0x60, {"group": "/c"}), (0x68, {})), "names_stream": True, "flows": True}),
            ("start_anew", {"which": 0, "reboot": False}),
            ("flow", {"which": 0}),
            ("start_anew", {"which": 0, "reboot": False}),
            ("open", {"wanted": wishes((0x40, {"node": "a"}), (0x7F, {"group": "/a"})), "names_stream": True, "flows": True}),
            ("come_back", {"number": 1, "found": False, "at_once": False, "before": 0}),
            ("burst", {"which": 0, "blocks": 8, "each": 2}),
        ],
    ),
    "all of the ring where the client is was taken by retention, and some of the next": (
        SmallMachine,
        [
            ("open", {"wanted": wishes((0x7F, {"group": "/a"})), "names_stream": True, "flows": True}),
            ("burst", {"which": 1, "blocks": 1, "each": 1}),
            ("go", {"number": 0, "before": 1, "stays": True}),
            ("start_anew", {"which": 1, "reboot": False}),
            ("flow", {"which": 1}),
            ("burst", {"which": 1, "blocks": 8, "each": 2}),
        ],
    ),
    "an absence in a ring that is over": (
        SqliteMachine,
        [
            ("open", {"wanted": wishes((0x68, {"follow": True}), (0x20, {"node": "a"})), "names_stream": False, "flows": True}),
            ("open", {"wanted": wishes((0x7F, {"follow": True})), "names_stream": True, "flows": True}),
            ("start_anew", {"which": 1, "reboot": True}),
            ("restart_under_load", {"found": False}),
            ("come_back", {"number": 1, "found": True, "at_once": True, "before": 0}),
            ("restart_under_load", {"found": False}),
        ],
    ),
    "what was lost behind the record where the client is": (
        MemoryMachine,
        [
            ("open", {"wanted": wishes((0x7F, {"group": "/a"}), (0x7F, {"group": "/c"})), "names_stream": True, "flows": True}),
            ("do", {"which": 0, "who": 0, "what": "exec", "lost": True}),
            ("burst", {"which": 0, "blocks": 1, "each": 1}),
            ("restart", {"crashes": False, "before": 1}),
        ],
    ),
    "a broker that armed it, told of that, and crashed": (
        SqliteMachine,
        [
            (
                "open",
                {
                    "wanted": wishes((0x68, {"pid": 1, "follow": True}), (0x68, {"follow": True, "node": "a"})),
                    "names_stream": True,
                    "flows": False,
                },
            ),
            ("commit", {}),
            ("flow", {"which": 1}),
            ("burst", {"which": 1, "blocks": 1, "each": 1}),
            ("restart", {"crashes": True, "before": 1}),
        ],
    ),
    "... and the node had been away when it was asked for": (
        SqliteMachine,
        [
            ("open", {"wanted": wishes((0x68, {"pid": 1, "follow": True, "node": "a"})), "names_stream": True, "flows": False}),
            ("restart_under_load", {"found": False}),
            ("do", {"which": 0, "who": 0, "what": "exec", "lost": False}),
            ("restart", {"crashes": True, "before": 3}),
        ],
    ),
    "a process that has ended, of a stream that came back, and a broker that is started again": (
        SqliteMachine,
        [
            ("send", {"which": 0, "count": 1, "beats": True}),
            ("burst", {"which": 0, "blocks": 6, "each": 1}),
            (
                "open",
                {
                    "wanted": wishes((0x20, {"pid": 3}), (0x7F, {"group": "/a"}), (0x7F, {"group": "/a/b"})),
                    "names_stream": True,
                    "flows": True,
                },
            ),
            ("commit", {}),
            ("restart", {"crashes": True, "before": 0}),
            ("do", {"which": 0, "who": 0, "what": "exit with a thread", "lost": False}),
            ("commit", {}),
            ("look_again", {}),
            ("restart_under_load", {"found": False}),
            ("come_back", {"number": 0, "found": True, "at_once": False, "before": 0}),
            ("deregister", {"number": 1, "which": 0}),
            ("commit", {}),
            ("end_slowly", {"which": 0, "who": 3, "ticks": 1}),
            ("spawn", {"which": 0, "group": "/a"}),
            ("open", {"wanted": wishes((0x7F, {})), "names_stream": False, "flows": True}),
            ("end_slowly", {"which": 0, "who": 0, "ticks": 0}),
            ("commit", {}),
            ("come_back", {"number": 0, "found": False, "at_once": False, "before": 0}),
            ("restart_under_load", {"found": False}),
            ("commit", {}),
        ],
    ),
    "what an earlier stream was told, and not all was known of the next": (
        MemoryMachine,
        [
            (
                "open",
                {
                    "wanted": wishes((0x7F, {"node": "a"}), (0x7F, {"group": "/c"}), (0x68, {"pid": 2, "node": "a"})),
                    "names_stream": True,
                    "flows": True,
                },
            ),
            ("start_anew", {"which": 0, "reboot": True}),
            ("restart_under_load", {"found": False}),
            ("deregister", {"number": 0, "which": 0}),
            ("come_back", {"number": 0, "found": False, "at_once": False, "before": 1}),
            ("come_back", {"number": 0, "found": False, "at_once": True, "before": 0}),
        ],
    ),
    "a ring, and the mark that it began, that retention took": (
        SmallMachine,
        [
            ("open", {"wanted": wishes((0x20, {"pid": 3})), "names_stream": True, "flows": True}),
            ("flow", {"which": 0}),
            ("disconnect", {"which": 0}),
            ("end_slowly", {"which": 0, "who": 0, "ticks": 0}),
            ("burst", {"which": 0, "blocks": 1, "each": 2}),
            ("start_anew", {"which": 0, "reboot": False}),
            ("flow", {"which": 0}),
            ("burst", {"which": 0, "blocks": 8, "each": 5}),
            ("come_back", {"number": 0, "found": False, "at_once": True, "before": 0}),
        ],
    ),
    "nobody's place goes to who may be somebody else": (
        SqliteMachine,
        [
            ("open", {"wanted": wishes((0x20, {"pid": 1, "node": "a"}), (0x7F, {"pid": 1})), "names_stream": False, "flows": True}),
            ("end_slowly", {"which": 1, "who": 0, "ticks": 0}),
            ("spawn", {"which": 1, "group": "/c"}),
            ("open", {"wanted": wishes((0x7F, {"pid": 1})), "names_stream": True, "flows": True}),
            ("restart_under_load", {"found": False}),
        ],
    ),
    "... nor is it offered twice, by a broker that is started again": (
        SqliteMachine,
        [
            ("open", {"wanted": wishes((0x7F, {"pid": 1})), "names_stream": False, "flows": True}),
            ("restart", {"crashes": False, "before": 0}),
            ("end_slowly", {"which": 1, "who": 0, "ticks": 0}),
            ("spawn", {"which": 1, "group": "/c"}),
            ("open", {"wanted": wishes((0x7F, {"pid": 1})), "names_stream": True, "flows": True}),
            ("restart_under_load", {"found": False}),
            ("restart_under_load", {"found": False}),
        ],
    ),
    "a broker that armed it and crashed, and the ring is gone": (
        SqliteMachine,
        [
            ("open", {"wanted": wishes((0x7F, {"group": "/a"}), (0x68, {})), "names_stream": True, "flows": True}),
            ("open", {"wanted": wishes((0x7F, {"group": "/a/b"})), "names_stream": True, "flows": False}),
            ("deregister", {"number": 0, "which": 0}),
            ("flow", {"which": 1}),
            ("do", {"which": 1, "who": 7, "what": "exec", "lost": False}),
            ("start_anew", {"which": 1, "reboot": False}),
            ("restart", {"crashes": True, "before": 1}),
        ],
    ),
    "a loss before rows, all of which retention took": (
        SmallMachine,
        [
            ("open", {"wanted": wishes((0x68, {}), (0x48, {"follow": True, "node": "a"})), "names_stream": True, "flows": True}),
            ("do", {"which": 0, "who": 0, "what": "exec", "lost": True}),
            ("come_back", {"number": 0, "found": False, "at_once": True, "before": 0}),
            ("end_slowly", {"which": 1, "who": 0, "ticks": 0}),
            ("request", {"number": 0, "count": 1000}),
            ("burst", {"which": 0, "blocks": 8, "each": 2}),
            ("go", {"number": 0, "before": 2, "stays": True}),
        ],
    ),
    "a child that nobody saw is nobody's": (
        MemoryMachine,
        [
            ("open", {"wanted": wishes((0x48, {"pid": 1, "follow": True}), (0x20, {})), "names_stream": True, "flows": True}),
            ("start_anew", {"which": 1, "reboot": False}),
            ("go", {"number": 0, "before": 0, "stays": False}),
            (
                "open",
                {
                    "wanted": wishes((0x7F, {"pid": 2, "follow": True, "node": "a"}), (0x60, {"group": "/c"})),
                    "names_stream": True,
                    "flows": True,
                },
            ),
            ("do", {"which": 1, "who": 0, "what": "fork", "lost": False}),
        ],
    ),
    "a tree as somebody else knew it": (
        SqliteMachine,
        [
            ("end_slowly", {"which": 0, "who": 0, "ticks": 0}),
            ("open", {"wanted": wishes((0x20, {"pid": 3, "follow": True}), (0x60, {"group": "/c"})), "names_stream": True, "flows": True}),
            ("flow", {"which": 0}),
            ("do", {"which": 0, "who": 1, "what": "fork", "lost": False}),
            ("open", {"wanted": wishes((0x68, {"pid": 3, "follow": True})), "names_stream": True, "flows": True}),
            ("go", {"number": 1, "before": 0, "stays": False}),
        ],
    ),
    "a loss where the cursor is, and nobody kept the place": (
        SqliteMachine,
        [
            ("open", {"wanted": wishes((0x7F, {"group": "/a/b"}), (0x40, {"pid": 2, "node": "a"})), "names_stream": True, "flows": True}),
            ("do", {"which": 0, "who": 1, "what": "exec", "lost": True}),
            ("restart_under_load", {"found": False}),
            ("come_back", {"number": 0, "found": False, "at_once": True, "before": 0}),
            ("go", {"number": 0, "before": 1, "stays": False}),
        ],
    ),
    "a place that was given up, and a broker that did not write that down": (
        SqliteMachine,
        [
            ("open", {"wanted": wishes((0x7F, {"group": "/a"})), "names_stream": True, "flows": True}),
            ("restart_under_load", {"found": False}),
            ("close", {"number": 0}),
            ("flow", {"which": 0}),
            ("open", {"wanted": wishes((0x60, {"group": "/a"})), "names_stream": True, "flows": False}),
            ("burst", {"which": 0, "blocks": 1, "each": 1}),
            ("restart", {"crashes": True, "before": 2}),
        ],
    ),
    "another process by the same number, after a reboot": (
        MemoryMachine,
        [
            ("open", {"wanted": wishes((0x7F, {"pid": 3})), "names_stream": True, "flows": True}),
            (
                "open",
                {"wanted": wishes((0x48, {"pid": 3, "follow": True}), (0x40, {}), (0x68, {"pid": 2})), "names_stream": True, "flows": True},
            ),
            ("start_anew", {"which": 1, "reboot": True}),
            ("open", {"wanted": wishes((0x60, {"group": "/a"})), "names_stream": True, "flows": True}),
            ("deregister", {"number": 1, "which": 1}),
            ("spawn", {"which": 1, "group": "/c"}),
            ("restart_under_load", {"found": True}),
            ("come_back", {"number": 1, "found": False, "at_once": True, "before": 1}),
        ],
    ),
    "what a broker knew to be lost, and is gone": (
        SmallMachine,
        [
            ("open", {"wanted": wishes((0x60, {"group": "/a/b"}), (0x60, {"group": "/a"})), "names_stream": True, "flows": True}),
            ("do", {"which": 0, "who": 0, "what": "exec", "lost": True}),
            ("burst", {"which": 0, "blocks": 1, "each": 4}),
            ("restart", {"crashes": False, "before": 3}),
        ],
    ),
    "a thread that ends after a process whose end nobody saw": (
        SmallMachine,
        [
            ("open", {"wanted": wishes((0x7F, {"pid": 2, "follow": True})), "names_stream": True, "flows": True}),
            ("start_anew", {"which": 1, "reboot": False}),
            ("do", {"which": 1, "who": 4, "what": "exit with a thread", "lost": False}),
        ],
    ),
    "... or whose end is in a gap": (
        SmallMachine,
        [
            ("end_slowly", {"which": 0, "who": 7, "ticks": 0}),
            ("end_slowly", {"which": 0, "who": 7, "ticks": 0}),
            (
                "open",
                {
                    "wanted": wishes((0x7F, {"pid": 1, "follow": True}), (0x20, {"pid": 3, "follow": True, "node": "a"})),
                    "names_stream": True,
                    "flows": True,
                },
            ),
            ("restart", {"crashes": False, "before": 0}),
            ("do", {"which": 0, "who": 0, "what": "exit with a thread", "lost": False}),
        ],
    ),
    "an end that a broker told of and forgot": (
        SqliteMachine,
        [
            ("open", {"wanted": wishes((0x48, {}), (0x48, {"pid": 2})), "names_stream": True, "flows": True}),
            ("end_slowly", {"which": 0, "who": 1, "ticks": 0}),
            ("start_anew", {"which": 0, "reboot": False}),
            ("restart", {"crashes": True, "before": 1}),
        ],
    ),
    "what was lost beside what retention took": (
        SmallMachine,
        [
            ("open", {"wanted": wishes((0x68, {"pid": 1})), "names_stream": True, "flows": True}),
            ("open", {"wanted": wishes((0x48, {})), "names_stream": True, "flows": True}),
            ("end_slowly", {"which": 1, "who": 0, "ticks": 0}),
            ("come_back", {"number": 1, "found": False, "at_once": True, "before": 0}),
            ("burst", {"which": 0, "blocks": 1, "each": 1}),
            ("burst", {"which": 0, "blocks": 7, "each": 1}),
            ("do", {"which": 1, "who": 0, "what": "fork", "lost": True}),
        ],
    ),
    "an end that is found while a stream comes back": (
        SqliteMachine,
        [
            ("open", {"wanted": wishes((0x7F, {"pid": 3, "follow": True}), (0x68, {"follow": True})), "names_stream": True, "flows": True}),
            ("start_anew", {"which": 1, "reboot": False}),
            ("do", {"which": 1, "who": 5, "what": "exit", "lost": False}),
            ("connect", {"which": 1}),
            ("come_back", {"number": 0, "found": False, "at_once": False, "before": 0}),
        ],
    ),
    "... and was asked for anew": (
        SmallMachine,
        [
            ("end_slowly", {"which": 1, "who": 0, "ticks": 0}),
            ("open", {"wanted": wishes((0x68, {"pid": 1, "follow": True})), "names_stream": False, "flows": True}),
            ("start_anew", {"which": 1, "reboot": True}),
            ("restart_under_load", {"found": False}),
            ("come_back", {"number": 0, "found": False, "at_once": True, "before": 0}),
            ("do", {"which": 0, "who": 0, "what": "exit with a thread", "lost": True}),
        ],
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.usefixtures("_small")
def test_script(name: str) -> None:
    machine, steps = SCRIPTS[name]
    for _ in range(TIMES if machine.file else 1):
        state = machine()
        state.begin()
        for step, given in steps:
            getattr(state, step)(**given)
        state.teardown()
