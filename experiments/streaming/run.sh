#!/usr/bin/env bash
# Latency, throughput and memory of streams, beside what else is installed; what has rows of this commit, hardware and
# options is not measured again. Wants an idle machine.
#   bash experiments/streaming/run.sh                 CPU, all cores: ours and theirs in one run
#   DEVICE=cuda bash experiments/streaming/run.sh     one GPU, up to a million series
# Other systems: pip install river statsforecast 'gluonts[torch]'; those that are not there are left out.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ "${DEVICE:-cpu}" = cuda ]; then
  streams=1,64,1000,10000,100000,1000000 crowd=10000,100000,1000000
else
  streams=1,64,1000,10000 crowd=1000,10000,50000
fi
failed=0
compiled=(); [ "${DEVICE:-cpu}" = cpu ] && compiled=(--compiled)  # wants a C++ compiler
"${PYTHON:-python}" -m tsgdn bench latency --device "${DEVICE:-cpu}" --streams "$streams" "${compiled[@]}" --resume "$@" || failed=1
"${PYTHON:-python}" -m tsgdn bench memory --device "${DEVICE:-cpu}" --streams "$crowd" --resume || failed=1
"${PYTHON:-python}" experiments/render.py
exit "$failed"
