#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What a node of a lab does when it has nothing to do: a few processes a second, most of which end well. /run/workload.pid names it.
#
# Every tenth ends with a code, every fifteenth is killed by itself, as a crash would.
echo $$ >/run/workload.pid
trap 'exit 0' TERM
count=0
while :; do
    count=$((count + 1))
    if [ $((count % 15)) = 0 ]; then
        sh -c 'kill -SEGV $$'
    elif [ $((count % 10)) = 0 ]; then
        sh -c 'exit 3'
    else
        /bin/true
    fi
    sleep 0.7
done >/dev/null 2>&1
