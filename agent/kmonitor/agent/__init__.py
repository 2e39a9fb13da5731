# SPDX-License-Identifier: Apache-2.0
"""The agent of one node: arms the probe in its kernel, and streams what comes to the broker."""
