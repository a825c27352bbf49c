#!/usr/bin/env bash
# Multi-query associative recall on all GPUs of a machine: five models, widths 16 to 64, lengths 256 and 512, 4 to 128 pairs,
# three learning rates, three seeds; then widths 16 and 32 against linear models with a state as large as all states of their twin.
#
# Device time: estimated, not measured. 150 + 20 cells of 4,000 recorded steps. On one H200 linear models of width 32 took 7 s a
# cell of length 256 where two processes trained six each on streams of their own; log-linear ones take longer: 20 to 30 minutes of
# one GPU, half of that on two.
#
# Started again, it goes on where it stopped: a cell (model, width, length, pairs, state, learning rate, seed) whose row is in
# rows.jsonl is skipped. Copy the output folder off the machine when a lease ends, and back before the next.
#
#   runs/mqar.sh [OUTPUT [WORKERS [AT_ONCE]]]     processes on all GPUs together, and models at a time in each
set -euo pipefail
output=${1:-out/mqar-full}
options=(${2:+--workers "$2"} ${3:+--at-once "$3"})
loglinear mqar --preset full --output "$output" "${options[@]}"

# 40 of these 60 cells are in the grid already.
mkdir -p "$output/matched"
[ -e "$output/matched/rows.jsonl" ] || cp "$output/rows.jsonl" "$output/matched/rows.jsonl"
loglinear mqar --preset full --output "$output/matched" "${options[@]}" --lengths 256 --widths 16 32 \
    --models "Mamba-2" "Log-Linear Mamba-2" "Gated DeltaNet" "Log-Linear Gated DeltaNet" --matched-state

# Where time allows, sequences of 1,024 tokens:
#   loglinear mqar --preset full --output "$output/long" "${options[@]}" --lengths 1024 --pairs 16 32 64 128 256
