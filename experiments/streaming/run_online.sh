#!/usr/bin/env bash
# Accuracy along a stream: fits, streams, pictures. DEVICE=cuda fits and streams on the GPU; WORKERS cells at a time.
set -euo pipefail
cd "$(dirname "$0")/../.."
DEVICE="${DEVICE:-cpu}" WORKERS="${WORKERS:-1}" MIXERS="${MIXERS:-gated_deltanet,mamba2}" SEEDS="${SEEDS:-0,1,2}"
TASKS="${TASKS:-etth1_adaptz,ettm1_dsof,wth_dsof,etth1_dsof,exchange_rate_dsof}"
python -m tsgdn bench online --tasks "$TASKS" --mixers "$MIXERS" --seeds "$SEEDS" --device "$DEVICE" --workers "$WORKERS"
python -m tsgdn bench online --tasks "$TASKS" --report
python experiments/render.py
