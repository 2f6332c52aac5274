#!/usr/bin/env bash
# Install every package of a lock into the environment of $PYTHON (default: python):  install-packages.sh LOCK
# pip's own variables, such as PIP_EXTRA_INDEX_URL, name further sources of packages.
set -euo pipefail

python=${PYTHON:-python}
"$python" -m pip install --no-cache-dir --requirement "$1"
"$python" -m pip check
