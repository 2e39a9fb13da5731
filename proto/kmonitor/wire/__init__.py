# SPDX-License-Identifier: Apache-2.0
"""What agent, broker and clients share beside protobuf: record layout, masks, selectors, clocks, errors."""
