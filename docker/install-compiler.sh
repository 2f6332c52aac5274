#!/usr/bin/env bash
# Install the C compiler that Triton needs when a model is first compiled for a GPU.
set -euo pipefail

apt-get update
apt-get install --yes --no-install-recommends gcc libc6-dev
rm -rf /var/lib/apt/lists/*
