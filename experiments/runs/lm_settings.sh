# Sourced by the scripts of one language model (lm_one.sh, lift_one.sh): the texts and the sizes that they share.
#
#   DATA=FOLDER OUTPUT=FOLDER
context=${CONTEXT:-16384} # the other settings from the environment are for trying it out
steps=${STEPS:-3072}
suffix=.jsonl
[ -e "$DATA/linux-c-long.train.jsonl" ] || suffix=.jsonl.xz
cache=(--cache "$OUTPUT/cache")
new=(--vocab-size 16384 --hidden-size "${WIDTH:-512}" --mamba-state-size "${STATE:-128}" --delta-num-heads "${HEADS:-6}"
    --learning-rate 1e-3) # a model that starts from nothing
train() {
    loglinear train --data "$DATA/linux-c-long.train$suffix" --validation-data "$DATA/linux-c-long.valid$suffix" \
        --context "$context" --packing document --batch-size "${BATCH:-4}" --log-every "${LOG:-16}" "${cache[@]}" "$@"
}
# evaluate_far RUN MEASURE...: at four times the trained context, where few files are long enough: texts follow each other.
evaluate_far() {
    [ -e "$1/recall/repeats.json" ] || loglinear evaluate "$1" --context $((4 * context)) --packing stream --batch-size 1 \
        --measures "${@:2}" --output "$1/recall" "${cache[@]}"
}
