#!/usr/bin/env bash
# One linear model of runs/lift.sh: its training, both continuations, and their losses by position and by distance of repeats, at
# the trained context and at four times as much.
#
#   DATA=FOLDER OUTPUT=FOLDER runs/lift_one.sh MIXER SEED
set -euo pipefail
context=${CONTEXT:-16384} # the other settings from the environment are for trying it out
steps=${STEPS:-3072}
suffix=.jsonl
[ -e "$DATA/linux-c-long.train.jsonl" ] || suffix=.jsonl.xz
cache=(--cache "$OUTPUT/cache")
data=(--data "$DATA/linux-c-long.train$suffix" --validation-data "$DATA/linux-c-long.valid$suffix"
    --context "$context" --packing document --batch-size "${BATCH:-4}" --log-every "${LOG:-16}" "${cache[@]}")
run=$OUTPUT/$1-s$2
mkdir -p "$run"
exec >>"$run.log" 2>&1
loglinear train "${data[@]}" --output "$run" --mixer "$1" --num-hidden-layers 8 --vocab-size 16384 \
    --hidden-size "${WIDTH:-512}" --mamba-state-size "${STATE:-128}" --delta-num-heads "${HEADS:-6}" --seed "$2" \
    --learning-rate 1e-3 --steps "$steps" --save-every "$steps" --evaluate-every "$steps" ${COMPILE---compile}
more=$((steps / 2))
for kind in plain lifted; do
    lift=()
    [ "$kind" = plain ] || lift=(--lift)
    # Half the first peak: what was learned is not to be forgotten. The seed is another, so that the order of texts is new.
    loglinear train "${data[@]}" --output "$run-$kind" --init "$run" "${lift[@]}" --seed "$((100 + $2))" \
        --learning-rate 5e-4 --steps "$more" --save-every "$more" --evaluate-every "$more" ${COMPILE---compile}
done
for kind in plain lifted; do
    measures=(repeats)
    [ "$kind" = plain ] || measures=(repeats levels)
    [ -e "$run-$kind/evaluation/repeats.json" ] || loglinear evaluate "$run-$kind" --batch-size 2 --measures repeats "${cache[@]}"
    [ -e "$run-$kind/recall/repeats.json" ] || loglinear evaluate "$run-$kind" --context $((4 * context)) --packing stream \
        --batch-size 1 --measures "${measures[@]}" --output "$run-$kind/recall" "${cache[@]}"
done
echo finished
