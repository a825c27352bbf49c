#!/usr/bin/env bash
# Needles that separate: 1, 4, 16 and 64 keys, and as many values of one key, each number after a fine-tune of its own of 1,600
# steps, three seeds of the fine-tune. The hits lie in OUTPUT/RUN/niah-KEYSkeys-SEED/niah.json.
#
#   experiments/runs/needles.sh OUTPUT RUN...    OUTPUT is that of experiments/runs/lm.sh, RUN the name of a model there
#
# Device time: not run yet; 400 steps with their test took about a minute of an H200 (762b638), so some five minutes a fine-tune.
# The GPUs of the machine take fine-tunes from one queue; started again, it goes on, and what is done is not done again.
set -euo pipefail
export OUTPUT=$1
shift
here=$(dirname "$0")
gpus=$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')
for seed in 1 2 3; do
    for keys in 16 4 64 1; do
        for run in "$@"; do
            echo "$run $keys $seed"
        done
    done
done | xargs -P "$gpus" --process-slot-var=CUDA_VISIBLE_DEVICES -L 1 "$here/needles_one.sh"
