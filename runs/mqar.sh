#!/usr/bin/env bash
# Multi-query associative recall on one GPU: five models, widths 16 to 64, lengths 256 and 512, 4 to 128 pairs, three learning
# rates, three seeds; then widths 16 and 32 against linear models with a state as large as all states of their twin.
#
# Device time: estimated, not measured. 150 + 20 cells of 4,000 recorded steps, 2 to 4 ms a step, one after the other: 25 to 45
# minutes of one GPU. Worker processes are spread over all GPUs of the machine; those of one GPU take turns on it and overlap
# the host's work (starting, compiling, recording).
#
# Started again, it goes on where it stopped: a cell (model, width, length, pairs, state, learning rate, seed) whose row is in
# rows.jsonl is skipped. Copy the output folder off the machine when a lease ends, and back before the next.
#
#   runs/mqar.sh [OUTPUT [WORKERS]]
set -euo pipefail
output=${1:-out/mqar-full}
workers=${2:-}
loglinear mqar --preset full --output "$output" ${workers:+--workers "$workers"}

# 40 of these 60 cells are in the grid already.
mkdir -p "$output/matched"
[ -e "$output/matched/rows.jsonl" ] || cp "$output/rows.jsonl" "$output/matched/rows.jsonl"
loglinear mqar --preset full --output "$output/matched" ${workers:+--workers "$workers"} --lengths 256 --widths 16 32 \
    --models "Mamba-2" "Log-Linear Mamba-2" "Gated DeltaNet" "Log-Linear Gated DeltaNet" --matched-state

# Where time allows, sequences of 1,024 tokens:
#   loglinear mqar --preset full --output "$output/long" ${workers:+--workers "$workers"} --lengths 1024 --pairs 16 32 64 128 256
