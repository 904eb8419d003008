#!/usr/bin/env bash
# All shapes with whatever contestants are installed; what has rows of this commit and hardware is not measured again.
# Needs a CUDA device. Where the code lies without its repository, TSGDN_COMMIT names the commit.
set -euo pipefail
cd "$(dirname "$0")/../.."
python3 -m tsgdn bench kernels --resume "$@" || echo "some cells failed: their rows say so instead of a time" >&2
python3 -m tsgdn bench kernels --report
python3 experiments/render.py
