#!/usr/bin/env bash
# One fine-tune of tunes.sh and its test, in OUTPUT/RUN/tuned-STEPS-SEED and niah-STEPS-SEED.
#
#   OUTPUT=FOLDER experiments/runs/tune_one.sh RUN STEPS SEED
set -euo pipefail
run=$OUTPUT/$1 name=$2-$3
context=${CONTEXT:-16384} # from the environment for trying it out, as SAMPLES is
cache=(--cache "$OUTPUT/cache")
exec >>"$run.tunes.log" 2>&1
lengths=($((context / 16)) $((context / 8)) $((context / 4)) $((context / 2)) "$context")
[ -e "$run/tuned-$name/record.json" ] || loglinear niah finetune "$run" --output "$run/tuned-$name" \
    --contexts "${lengths[@]}" --steps "$2" --seed "$3" "${cache[@]}"
[ -e "$run/niah-$name/niah.json" ] || loglinear niah evaluate "$run/tuned-$name" --output "$run/niah-$name" \
    --samples "${SAMPLES:-5}" --depths 5 --contexts $((context / 16)) $((context / 4)) "$context" "${cache[@]}"
