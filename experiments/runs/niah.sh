#!/usr/bin/env bash
# Needle in a haystack and recall on real text for any number of trained models, each after the same fine-tune.
#
#   experiments/runs/niah.sh OUTPUT CHECKPOINT...
#
# The models must share tokenizer and data, as runs of `loglinear train` with one --data and --cache do; they then see the
# same needles in the same text. Fine-tuned on up to 16K tokens, tested to 64K. Models that are done are skipped.
set -euo pipefail
output=$1
shift
if [ "$(basename -a "$@" | sort | uniq -d)" ]; then
    echo "experiments/runs/niah.sh: two checkpoints of one name would share a folder below $output" >&2
    exit 1
fi
for checkpoint in "$@"; do
    name=$(basename "$checkpoint")
    # Before the fine-tune: loss by position at four times the trained context, repeats, definitions, and λ.
    record=$checkpoint/record.json
    [ -e "$record" ] || record=$(dirname "$checkpoint")/record.json # of the run that the checkpoint is one of
    context=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["arguments"]["context"])' "$record")
    measures=(repeats retrieval) # the last one is the mark of all
    if grep -q '"log_linear' "$checkpoint/config.json"; then measures=(levels "${measures[@]}"); fi
    if [[ ! -e $output/$name/recall/retrieval.json ]]; then
        loglinear evaluate "$checkpoint" --context $((4 * context)) --packing document --batch-size 1 \
            --measures "${measures[@]}" --output "$output/$name/recall"
    fi
    if [[ ! -e $output/$name/tuned/record.json ]]; then
        loglinear niah finetune "$checkpoint" --contexts 1024 2048 4096 8192 16384 --output "$output/$name/tuned"
    fi
    if [[ ! -e $output/$name/niah/niah.json ]]; then
        loglinear niah evaluate "$output/$name/tuned" --contexts 1024 2048 4096 8192 16384 32768 65536 \
            --output "$output/$name/niah"
    fi
done
