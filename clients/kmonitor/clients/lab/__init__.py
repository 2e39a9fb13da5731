# SPDX-License-Identifier: Apache-2.0
"""A cluster on one machine, without Docker: nodes made of network and pid namespaces. The command is `kmon lab`.

`lab.py` is the whole; `network.py` and `machine.py` make one node, and the tests' clusters too; `init.py` is a node's process 1.
"""
