#!/usr/bin/env bash
# The retention study. PRESET=smoke (two cores, minutes, not evidence) or paper (a GPU). Resumable: the same command
# goes on with what is missing; BUDGET ends a piece in time. Everything lies in OUT, which may be carried elsewhere.
set -euo pipefail
cd "$(dirname "$0")/../.."
preset="${PRESET:-smoke}"
out="${OUT:-runs/retention-$preset}"
device="${DEVICE:-cpu}"
python -m tsgdn bench retention --preset "$preset" --out "$out" --device "$device" ${BUDGET:+--budget "$BUDGET"} "$@"
if [ "$preset" = paper ]; then
  cp "$out/results.csv" experiments/retention/results.csv
  cp "$out"/figures/*.png experiments/retention/
fi
python experiments/render.py
