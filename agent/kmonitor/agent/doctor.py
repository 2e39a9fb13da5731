# SPDX-License-Identifier: Apache-2.0
"""`kmonitor-agent --check`: every source tried on this machine, by this user; which one `--source auto` takes, and why."""

from __future__ import annotations

import json as json_module
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kmonitor.agent.checks import Check, facts, pid_namespace
from kmonitor.agent.probe import ProbeOptions
from kmonitor.agent.sources import SOURCES, SourceName, start
from kmonitor.wire.errors import KmonitorError

NEEDS: dict[SourceName, str] = {
    "core": "Linux 5.10 or later with BTF, libbpf 1.0 or later, CAP_BPF and CAP_PERFMON",
    "bcc": "Linux 5.10 or later with BTF or its headers, python3-bpfcc, libbpf 1.0 or later, CAP_BPF and CAP_PERFMON",
    "netlink": "CONFIG_PROC_EVENTS, CAP_NET_ADMIN (from 6.6 on for a larger buffer only), the initial pid, user and net namespaces",
}
_SMALL_RING = 64 << 10  # enough to see that it works
Scope = Literal["host", "pidns"]


@dataclass(frozen=True, slots=True)
class Trial:
    """How a source did."""

    source: SourceName
    refusal: str
    """Why it does not work, in one line; empty if it does."""


def try_sources(scope: Scope) -> list[Trial]:
    """Start each and end it again, pinning nothing: only so it is known what the kernel allows. In the order of `auto`."""
    trials = []
    for name in SOURCES:
        try:
            start(name, ProbeOptions(scope=scope, ring_bytes=_SMALL_RING), None).close()
        except (KmonitorError, OSError) as error:  # OSError: no /proc, no descriptor left
            trials.append(Trial(name, str(error).removesuffix("; see kmon doctor")))
        else:
            trials.append(Trial(name, ""))
    return trials


def report(scope: Scope | None, pin_root: Path, *, json: bool) -> int:
    """Print facts, trials and verdict on stdout. The exit status: 0 if a source works, else 2."""
    chosen = scope or _possible_scope()
    trials = try_sources(chosen)
    works = any(not trial.refusal for trial in trials)
    for check in facts(pin_root):
        # With a source that works, nothing is in the way of all of them.
        _print(replace(check, status="warn") if works and check.status == "fail" else check, {}, json=json)
    for trial in trials:
        _print(*_of_trial(trial, chosen, works=works), json=json)
    _print(*_verdict(trials, chosen, given=scope is not None), json=json)
    return 0 if works else 2


def _possible_scope() -> Scope:
    """Where nobody said which: host pids are to be had in the initial namespace alone."""
    return "host" if pid_namespace().status == "ok" else "pidns"


def _of_trial(trial: Trial, scope: Scope, *, works: bool) -> tuple[Check, dict[str, Any]]:
    more = {"source": trial.source, "scope": scope, "works": not trial.refusal, "needs": NEEDS[trial.source]}
    name = f"source {trial.source}"
    if not trial.refusal:
        return Check("ok", name, f"works with scope {scope}"), more
    return Check("warn" if works else "fail", name, trial.refusal, f"it needs {more['needs']}"), more


def _verdict(trials: list[Trial], scope: Scope, *, given: bool) -> tuple[Check, dict[str, Any]]:
    taken = next((trial.source for trial in trials if not trial.refusal), None)
    more = {"source": taken, "scope": scope, "works": taken is not None, "host": platform.node()}
    if taken is None:
        return Check("fail", "auto", "no source works here, as this user", "mend what the source that you want lacks"), more
    before = [trial.source for trial in trials[: [trial.source for trial in trials].index(taken)]]
    why = f"the first that works: not {', not '.join(before)}" if before else "the first choice, and it works"
    if scope == "pidns" and not given:
        return Check(
            "warn", "auto", f"takes source {taken}, {why}", "this is a child pid namespace: run the agent with --scope pidns"
        ), more
    return Check("ok", "auto", f"takes source {taken}, {why}"), more


def _print(check: Check, more: dict[str, Any], *, json: bool) -> None:
    if json:
        print(json_module.dumps(asdict(check) | more, separators=(",", ":")))
    else:
        advice = f"  [{check.advice}]" if check.advice else ""
        print(f"{check.status:4}  {check.name:16}  {check.found}{advice}")
