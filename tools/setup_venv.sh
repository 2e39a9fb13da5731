#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Make the virtual environment, or bring it up to date: the package, editable, with what development takes.
#
#   setup_venv.sh FOLDER       PYTHON names the interpreter, if it is not python3
set -eu
cd "$(dirname "$0")/.."
venv=$1
python=${PYTHON:-python3}

# One whose interpreter has gone is of no use, nor is one that came here with a copied or moved checkout: its commands
# would run those of the other place. The Makefile's stamp says where it was made.
stamp=$venv/kmonitor.stamp
if [ -e "$venv" ] && ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    rm -rf "$venv"
elif [ -s "$stamp" ] && [ "$(cat "$stamp")" != "$PWD" ]; then
    rm -rf "$venv"
fi
if [ ! -e "$venv" ]; then
    echo "Making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
echo "Installing Python packages into $venv"
pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --constraint constraints.txt "$@"
}
# The build backend comes first, and from the same pinned list: then the package is built without an environment of its own.
pip hatchling
pip --no-build-isolation --editable '.[dev]'
