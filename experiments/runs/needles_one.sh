#!/usr/bin/env bash
# One fine-tune of needles.sh and its test, in OUTPUT/RUN/tuned-KEYSkeys-SEED and niah-KEYSkeys-SEED.
#
#   OUTPUT=FOLDER experiments/runs/needles_one.sh RUN KEYS SEED
set -euo pipefail
run=$OUTPUT/$1 keys=$2 name=$2keys-$3
context=${CONTEXT:-16384} # from the environment for trying it out, as STEPS and SAMPLES are
exec >>"$run.needles.log" 2>&1
lengths=($((context / 4)) $((context / 2)) "$context") # 64 needles need some 2,000 tokens
[ "$keys" = 64 ] || lengths=($((context / 16)) $((context / 8)) "${lengths[@]}")
task=(--cache "$OUTPUT/cache" --kinds multi-key multi-value --needles "$keys")
[ "$keys" != 1 ] || task=(--cache "$OUTPUT/cache" --kinds number)
[ -e "$run/tuned-$name/record.json" ] || loglinear niah finetune "$run" --output "$run/tuned-$name" \
    --contexts "${lengths[@]}" --steps "${STEPS:-1600}" --seed "$3" "${task[@]}"
[ -e "$run/niah-$name/niah.json" ] || loglinear niah evaluate "$run/tuned-$name" --output "$run/niah-$name" \
    --samples "${SAMPLES:-5}" --depths 5 --contexts "${lengths[@]}" $((2 * context)) $((4 * context)) "${task[@]}"
