# SPDX-License-Identifier: Apache-2.0
"""A cluster on one machine, without Docker: nodes made of network and pid namespaces. The command is `kmon lab`."""
