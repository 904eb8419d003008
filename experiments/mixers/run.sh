#!/usr/bin/env bash
# Every mixer and hybrid: cost of its backbone, and validation WQL with three seeds; what has rows is not run again.
# Needs $TSGDN_DATA. On a machine with a GPU: DEVICE=cuda and --set trainer.accelerator=gpu.
set -euo pipefail
cd "$(dirname "$0")/../.."
python -m tsgdn bench mixers --tasks etth1,m4_hourly --seeds 0,1,2 --workers "${WORKERS:-2}" \
  --device "${DEVICE:-cpu}" --set trainer.max_epochs=8 "$@"
python -m tsgdn bench mixers --report
python experiments/render.py
