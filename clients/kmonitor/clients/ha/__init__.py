# SPDX-License-Identifier: Apache-2.0
"""What tells a cluster's HA manager of the ends of its processes: `pacemaker`, and `keepalived`. Both are built on
`kmonitor.clients.guard`."""
