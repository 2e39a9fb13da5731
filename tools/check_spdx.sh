#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Every source file says its licence near its top. Generated code is left out: its .proto says it.
#
#   check_spdx.sh [FOLDER]     a git checkout, this one if none is named
set -eu
cd "${1:-$(dirname "$0")/..}"

# The checkout may belong to another user than the one who runs this, as in a container.
git -c safe.directory='*' ls-files --cached --others --exclude-standard -- \
    '*.py' '*.pyi' '*.c' '*.h' '*.proto' '*.sh' '*.js' '*.mjs' '*.ts' '*.go' '*.yml' '*.yaml' \
    Makefile '*/Makefile' '*Dockerfile*' 'deploy/*' .ci/run pyproject.toml |
    {
        bad=0
        while IFS= read -r file; do
            case $file in *_pb2.py | *_pb2.pyi | *_pb2_grpc.py | *_pb2_grpc.pyi) continue ;; esac
            [ -s "$file" ] || continue
            head -n 5 "$file" | grep -q 'SPDX-License-Identifier: ' || {
                echo "$file: no SPDX-License-Identifier in its first five lines" >&2
                bad=1
            }
        done
        exit "$bad"
    }
