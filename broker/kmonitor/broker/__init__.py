# SPDX-License-Identifier: Apache-2.0
"""The broker: takes blocks of records from the agents, and gives every monitor the rows it registered for."""
