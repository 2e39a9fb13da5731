# SPDX-License-Identifier: Apache-2.0
"""`kmon version`: this installation's, and the broker's."""

from __future__ import annotations

import json as json_module

from kmonitor.clients.cli.options import Broker, Json, run
from kmonitor.wire.plain import plain_text
from kmonitor.wire.version import installed_version


def show_version(*, json: Json = False, broker: Broker = "127.0.0.1:7221") -> None:
    """Print the version of kmon, and of the broker.

    Exit status: 0 done, 3 no broker, 4 not authorised; the version of kmon is printed all the same.
    """
    run(_version(broker, json))


async def _version(broker: str, json: bool) -> int:
    from kmonitor.clients.monitor import connect  # noqa: PLC0415 - gRPC is not for --help

    own = installed_version()
    if not json:
        print(f"kmon    {own}", flush=True)
    async with connect(broker) as monitor:
        theirs = await monitor.broker_version()
    if json:
        print(json_module.dumps({"kmon": own, "broker": theirs, "address": broker}, separators=(",", ":")))
    else:
        print(f"broker  {plain_text(theirs) or 'not known: it is older than 0.1.0'}")
    return 0
