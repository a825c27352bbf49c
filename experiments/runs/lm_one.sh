#!/usr/bin/env bash
# One model of lm.sh: training, loss by position, repeats, definitions asked for again and λ by level; for the first seed
# also needles, after the same short fine-tune for all. `prepare` only tokenizes.
#
#   DATA=FOLDER OUTPUT=FOLDER experiments/runs/lm_one.sh MIXER LAYERS SEED
set -euo pipefail
. "$(dirname "$0")/lm_settings.sh"

if [ "$1" = prepare ]; then
    train "${new[@]}" --output "$OUTPUT/prepare" --num-hidden-layers 1 --steps 1 --save-every "${LOG:-16}"
    exit
fi
run=$OUTPUT/$1-s$3
mkdir -p "$run"
exec >>"$run.log" 2>&1
half=$((steps / 2))
train "${new[@]}" --output "$run" --mixer "$1" --num-hidden-layers "$2" --seed "$3" --steps "$steps" \
    --save-every "$half" --evaluate-every "$half" ${COMPILE---compile}
# At the trained context every sequence lies in one file.
[ -e "$run/evaluation/repeats.json" ] || loglinear evaluate "$run" --batch-size 2 --measures repeats "${cache[@]}"
measures=(retrieval repeats)
case $1 in log_linear_*) measures=(levels "${measures[@]}") ;; esac
evaluate_far "$run" "${measures[@]}"
[ "$3" = 0 ] || exit 0
lengths=($((context / 16)) $((context / 8)) $((context / 4)) $((context / 2)) "$context")
[ -e "$run/tuned/record.json" ] || loglinear niah finetune "$run" --output "$run/tuned" --contexts "${lengths[@]}" \
    --steps "${TUNE_STEPS:-400}" "${cache[@]}"
[ -e "$run/niah/niah.json" ] || loglinear niah evaluate "$run/tuned" --output "$run/niah" --samples "${SAMPLES:-5}" \
    --depths 5 --contexts "${lengths[@]}" $((2 * context)) $((4 * context)) "${cache[@]}"
echo finished
