#!/usr/bin/env bash
# Install this project into the environment of $PYTHON (default: python), which has the packages of its lock:
# install-lacy.sh FOLDER.  Downloads nothing.
set -euo pipefail

python=${PYTHON:-python}
"$python" -m pip install --no-cache-dir --no-index --no-deps --no-build-isolation "$1"
"$python" -m lacy --version
