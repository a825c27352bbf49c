"""benchmarks/model_decoding.py at a tiny size: rows that say what was timed, and a check that can fail."""

import json
import sys
from pathlib import Path

import pytest
import torch

from loglinear.models.decoding import DecodingGraph

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES = ["--hidden-size", "32", "--layers", "2", "--vocab-size", "50", "--device", "cpu", "--dtype", "float32"]
MODELS = ["log_linear_mamba2", "mamba2", "attention", "attention without mask"]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """``command(*options)`` runs the benchmark in this process, with its rows in ``tmp_path``."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import model_decoding

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["model_decoding.py", *SIZES, "--results", str(tmp_path), *options])
        model_decoding.main()

    return run


def test_rows(command, tmp_path):
    command("--models", *MODELS, "--contexts", "128", "4096", "--steps", "4", "--B", "2")
    rows = [json.loads(line) for line in (tmp_path / "model_decoding.jsonl").read_text().splitlines()]
    assert [(row["model"], row["context"]) for row in rows] == [(name, n) for name in MODELS for n in (128, 4096)]
    state = {(row["model"], row["context"]): row["state_bytes"] for row in rows}
    for row in rows:
        assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert row["error_against_one_pass"] < 1e-5
        assert (row["timing"], row["B"], row["layers"], row["dtype"]) == ("eager", 2, 2, "float32")
    # Two layers and rows: five slots more, each of one head of 128 x 64 in bfloat16 and two logs.
    assert state["mamba2", 128] == state["mamba2", 4096]
    slots = 5 * 2 * 2 * (64 * 128 * 2 + 2 * 4)
    assert state["log_linear_mamba2", 4096] - state["log_linear_mamba2", 128] == slots
    assert state["attention", 4096] - state["attention", 128] == 2 * 2 * 2 * (4096 - 128) * 32 * 4


def test_entries_may_be_coarser_than_weights(command, tmp_path):
    """Their rounding is no error of a step: that one is looked for with float32 entries, and the row says what these cost."""
    command("--models", "log_linear_gated_deltanet", "--contexts", "256", "--steps", "4", "--entries", "bfloat16")
    (row,) = (json.loads(line) for line in (tmp_path / "model_decoding.jsonl").read_text().splitlines())
    assert 1e-4 < row["error_against_one_pass"] < 2e-3  # measured 3.4e-4, and 1.8e-7 with entries in float32


def test_nothing_is_timed_when_a_step_is_wrong(command, tmp_path, monkeypatch):
    monkeypatch.setattr(DecodingGraph, "_forward", lambda self, ids: torch.ones(2, 50))
    with pytest.raises(SystemExit, match="mamba2 is wrong in float32"):
        command("--models", "mamba2", "--contexts", "256", "--steps", "4")
    assert not (tmp_path / "model_decoding.jsonl").exists()
