#!/usr/bin/env bash
# One linear model of lift.sh: its training, both continuations, and their losses by position and by distance of repeats, at
# the trained context and at four times as much.
#
#   DATA=FOLDER OUTPUT=FOLDER experiments/runs/lift_one.sh MIXER SEED
set -euo pipefail
. "$(dirname "$0")/lm_settings.sh"
run=$OUTPUT/$1-s$2
mkdir -p "$run"
exec >>"$run.log" 2>&1
train "${new[@]}" --output "$run" --mixer "$1" --num-hidden-layers 8 --seed "$2" \
    --steps "$steps" --save-every "$steps" --evaluate-every "$steps" ${COMPILE---compile}
more=$((steps / 2))
for kind in plain lifted; do
    lift=()
    [ "$kind" = plain ] || lift=(--lift)
    # Half the first peak: what was learned is not to be forgotten. The seed is another, so that the order of texts is new.
    train --output "$run-$kind" --init "$run" "${lift[@]}" --seed "$((100 + $2))" \
        --learning-rate 5e-4 --steps "$more" --save-every "$more" --evaluate-every "$more" ${COMPILE---compile}
done
for kind in plain lifted; do
    measures=(repeats)
    [ "$kind" = plain ] || measures=(repeats levels)
    [ -e "$run-$kind/evaluation/repeats.json" ] || loglinear evaluate "$run-$kind" --batch-size 2 --measures repeats "${cache[@]}"
    evaluate_far "$run-$kind" "${measures[@]}"
done
echo finished
