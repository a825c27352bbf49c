#!/usr/bin/env bash
# Multi-query associative recall on all GPUs of a machine: five models, widths 16 to 64, lengths 256 and 512, 4 to 128 pairs,
# four learning rates, three seeds; then widths 16 and 32 against linear models with a state as large as all states of their twin.
#
# Device time: 180 + 24 cells of 4,000 recorded steps, 8 at a time in each of four processes: 8 minutes of two H200s for the
# first three rates (97f492e), two and a half for the fourth (762b638, beside other work).
#
# Started again, it goes on where it stopped: a cell (model, width, length, pairs, state, learning rate, seed) whose row is in
# rows.jsonl is skipped. Copy the output folder off the machine when a lease ends, and back before the next.
#
#   experiments/runs/mqar.sh [OUTPUT [WORKERS [AT_ONCE]]]     processes on all GPUs together, and models at a time in each
set -euo pipefail
output=${1:-out/mqar-full}
options=(${2:+--workers "$2"} ${3:+--at-once "$3"})
loglinear mqar --preset full --output "$output" "${options[@]}"

# Those of the narrow keys are in the grid already.
mkdir -p "$output/matched"
[ -e "$output/matched/rows.jsonl" ] || cp "$output/rows.jsonl" "$output/matched/rows.jsonl"
loglinear mqar --preset full --output "$output/matched" "${options[@]}" --lengths 256 --widths 16 32 \
    --models "Mamba-2" "Log-Linear Mamba-2" "Gated DeltaNet" "Log-Linear Gated DeltaNet" --matched-state

# Where time allows, sequences of 1,024 tokens:
#   loglinear mqar --preset full --output "$output/long" "${options[@]}" --lengths 1024 --pairs 16 32 64 128 256
