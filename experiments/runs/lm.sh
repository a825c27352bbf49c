#!/usr/bin/env bash
# Language modelling: five models of about 40M parameters on the same 201M tokens at a context of 16,384, two seeds for the
# linear models and their log-linear twins, and what each of them remembers (lm_one.sh).
#
#   experiments/runs/lm.sh FOLDER [OUTPUT]     FOLDER holds linux-c-long.{train,valid}.jsonl, or the same as .jsonl.xz
#
# Device time: a model took 5 to 6 minutes of one H200 (0bb4eb9), and with the needles, which only first seeds have, some 3 more.
# For all nine about an hour by estimate, which as many GPUs divide as there are.
#
# Each model is one job on one GPU; the GPUs of the machine take jobs from one queue, the longest first. Started again, it
# goes on: training from its last checkpoint, and what is done is not done again.
set -euo pipefail
export DATA=$1 OUTPUT=${2:-out/lm}
here=$(dirname "$0")
mkdir -p "$OUTPUT"

"$here/lm_one.sh" prepare # the tokens, once, before several jobs would each make them
gpus=$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')
# The Transformer has more layers, for as many parameters.
xargs -P "$gpus" --process-slot-var=CUDA_VISIBLE_DEVICES -L 1 "$here/lm_one.sh" <<'JOBS'
attention 10 0
log_linear_gated_deltanet 8 0
log_linear_mamba2 8 0
gated_deltanet 8 0
mamba2 8 0
log_linear_gated_deltanet 8 1
log_linear_mamba2 8 1
gated_deltanet 8 1
mamba2 8 1
JOBS
