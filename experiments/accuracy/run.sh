#!/usr/bin/env bash
# The four headline cells, two mixers, three seeds; what has rows is not run again. Needs $TSGDN_DATA.
set -euo pipefail
cd "$(dirname "$0")/../.."
python -m tsgdn bench gluonts --tasks etth1,us_births,m4_hourly,exchange_rate_nips \
  --mixers gated_deltanet,mamba2 --seeds 0,1,2 --workers "${WORKERS:-2}" "$@"
python experiments/render.py
