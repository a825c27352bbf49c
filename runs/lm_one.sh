#!/usr/bin/env bash
# One model of runs/lm.sh: training, loss by position, repeats, definitions asked for again and λ by level; for the first seed
# also needles, after the same short fine-tune for all. `prepare` only tokenizes.
#
#   DATA=FOLDER OUTPUT=FOLDER runs/lm_one.sh MIXER LAYERS SEED
set -euo pipefail
context=${CONTEXT:-16384} # the other settings from the environment are for trying it out
steps=${STEPS:-3072}
suffix=.jsonl
[ -e "$DATA/linux-c-long.train.jsonl" ] || suffix=.jsonl.xz
cache=(--cache "$OUTPUT/cache")
train() {
    loglinear train --data "$DATA/linux-c-long.train$suffix" --validation-data "$DATA/linux-c-long.valid$suffix" \
        --context "$context" --packing document --vocab-size 16384 --hidden-size "${WIDTH:-512}" \
        --mamba-state-size "${STATE:-128}" --delta-num-heads "${HEADS:-6}" --batch-size "${BATCH:-4}" --learning-rate 1e-3 \
        --log-every "${LOG:-16}" "${cache[@]}" "$@"
}

if [ "$1" = prepare ]; then
    train --output "$OUTPUT/prepare" --num-hidden-layers 1 --steps 1 --save-every "${LOG:-16}"
    exit
fi
run=$OUTPUT/$1-s$3
mkdir -p "$run"
exec >>"$run.log" 2>&1
half=$((steps / 2))
train --output "$run" --mixer "$1" --num-hidden-layers "$2" --seed "$3" --steps "$steps" \
    --save-every "$half" --evaluate-every "$half" ${COMPILE---compile}
# At the trained context every sequence lies in one file; at four times as much few files are long enough.
[ -e "$run/evaluation/repeats.json" ] || loglinear evaluate "$run" --batch-size 2 --measures repeats "${cache[@]}"
measures=(retrieval repeats)
case $1 in log_linear_*) measures=(levels "${measures[@]}") ;; esac
[ -e "$run/recall/repeats.json" ] || loglinear evaluate "$run" --context $((4 * context)) --packing stream --batch-size 1 \
    --measures "${measures[@]}" --output "$run/recall" "${cache[@]}"
[ "$3" = 0 ] || exit 0
lengths=($((context / 16)) $((context / 8)) $((context / 4)) $((context / 2)) "$context")
[ -e "$run/tuned/record.json" ] || loglinear niah finetune "$run" --output "$run/tuned" --contexts "${lengths[@]}" \
    --steps "${TUNE_STEPS:-400}" "${cache[@]}"
[ -e "$run/niah/niah.json" ] || loglinear niah evaluate "$run/tuned" --output "$run/niah" --samples "${SAMPLES:-5}" \
    --depths 5 --contexts "${lengths[@]}" $((2 * context)) $((4 * context)) "${cache[@]}"
echo finished
