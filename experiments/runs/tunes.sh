#!/usr/bin/env bash
# Needles again: models of lm.sh after other fine-tunes, with another seed of the samples or for longer. Says whether a
# difference between two models is one of the models or of the moment at which a short fine-tune happens to end.
#
#   experiments/runs/tunes.sh OUTPUT RUN...     OUTPUT is that of experiments/runs/lm.sh, RUN the name of a model there, as gated_deltanet-s0
#
# Device time: two fine-tunes of 400 steps side by side on one H200, with their tests, took 2 min 20 s (762b638); 1,600 steps take
# four minutes by estimate. The GPUs of the machine take fine-tunes from one queue; started again, it goes on, and what is done is
# not done again.
set -euo pipefail
export OUTPUT=$1
shift
here=$(dirname "$0")
gpus=$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')
for run in "$@"; do
    for tune in "1600 0" "400 1" "400 2"; do
        echo "$run $tune"
    done
done | xargs -P "$gpus" --process-slot-var=CUDA_VISIBLE_DEVICES -L 1 "$here/tune_one.sh"
