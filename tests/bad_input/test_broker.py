# SPDX-License-Identifier: Apache-2.0
"""`kmonitor-broker` with what cannot be."""

from __future__ import annotations

from tests.bad_input.refusal import refused, refused_by_usage, run_all
from tests.lab.services import Lab


def test_bad_value(lab: Lab) -> None:
    cases = {
        ("--log", "sqlite:x"): "not in this version",
        ("--log", "nats://127.0.0.1"): "not in this version",
        ("--log", "moon"): "--log moon: unknown",
        ("--listen", "moon"): "'moon' is no address to listen on",
        ("--listen", "127.0.0.1:65536"): "write HOST:PORT",
        ("--listen", "192.0.2.1:7221"): "cannot listen on 192.0.2.1:7221",  # TEST-NET-1: no host has it
        ("--lease", "soon"): "'soon' is no duration",
        ("--lease", "1ms"): "give 250ms to 60m",
        ("--progress-interval", "0s"): "give 10ms to 60m",
        ("--log-bytes", "much"): "'much' is no size",
        ("--log-bytes", "1K"): "give at least 1M",
    }
    for words, done in zip(cases.values(), run_all(lab, [["kmonitor-broker", *options] for options in cases]), strict=True):
        refused(done, 2, words)
        assert done.stdout == "", done


def test_port_in_use(lab: Lab) -> None:
    broker = lab.broker()
    refused(lab.run("kmonitor-broker", "--listen", broker.address), 2, f"cannot listen on {broker.address}", "in use")


def test_usage(lab: Lab) -> None:
    refused_by_usage(lab.run("kmonitor-broker", "--nosuch"), "--nosuch")
