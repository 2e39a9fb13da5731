#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Generate the Python of proto/kmonitor/v1/*.proto, with type stubs.
#
#   generate.sh VENV           beside the .proto files
#   generate.sh VENV --check   into a temporary folder; fails if what is checked in differs
set -eu
cd "$(dirname "$0")/.."
venv=$1
out=proto
if [ "${2:-}" = --check ]; then
    out=$(mktemp -d)
    trap 'rm -rf "$out"' EXIT
fi

"$venv/bin/python" -m grpc_tools.protoc -I proto \
    --plugin=protoc-gen-mypy="$venv/bin/protoc-gen-mypy" --plugin=protoc-gen-mypy_grpc="$venv/bin/protoc-gen-mypy_grpc" \
    --python_out="$out" --grpc_python_out="$out" --mypy_out="quiet:$out" --mypy_grpc_out="quiet:$out" \
    proto/kmonitor/v1/*.proto
[ "$out" != proto ] || exit 0

# Both ways: a stale file, and one whose .proto has gone.
for file in proto/kmonitor/v1/*_pb2* ; do
    [ -e "$out/${file#proto/}" ] || { echo "kmonitor: $file has no .proto any more: remove it" >&2; exit 1; }
done
for file in "$out"/kmonitor/v1/*; do
    cmp -s "$file" "proto/${file#"$out"/}" || {
        echo "kmonitor: proto/${file#"$out"/} is not what its .proto gives: run make generate" >&2
        exit 1
    }
done
