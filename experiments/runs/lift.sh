#!/usr/bin/env bash
# Is lifting worth it? Linear language models of about 39M parameters, trained on 201M tokens as in lm.sh, go on twice with
# the same 101M tokens in the same order: as they are, and lifted (lift_one.sh). Pairs share everything but the levels.
#
#   experiments/runs/lift.sh FOLDER [OUTPUT]     FOLDER holds linux-c-long.{train,valid}.jsonl, or the same as .jsonl.xz
#
# Device time: on two H200s 21 minutes without the evaluations, two jobs to a GPU (ff79fd8).
#
# The GPUs of the machine take jobs from one queue. Started again, it goes on, and what is done is not done again.
# `python experiments/lift.py OUTPUT` collects the rows and prints the differences of the pairs.
set -euo pipefail
export DATA=$1 OUTPUT=${2:-out/lift}
here=$(dirname "$0")
mkdir -p "$OUTPUT"

"$here/lm_one.sh" prepare # the tokens, once, before several jobs would each make them
gpus=$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')
xargs -P "$gpus" --process-slot-var=CUDA_VISIBLE_DEVICES -L 1 "$here/lift_one.sh" <<'JOBS'
gated_deltanet 0
mamba2 0
gated_deltanet 1
mamba2 1
JOBS
# Needles: the same two short fine-tunes for both continuations of each.
for model in gated_deltanet-s0 mamba2-s0 gated_deltanet-s1 mamba2-s1; do
    for tune in "400 1" "400 2"; do
        for kind in plain lifted; do
            echo "$model-$kind $tune"
        done
    done
done | xargs -P "$gpus" --process-slot-var=CUDA_VISIBLE_DEVICES -L 1 "$here/tune_one.sh"
