"""`python -m loglinear.cli.harness`: lm-eval's RULER task on a checkpoint, without a network."""

from __future__ import annotations

import importlib.util
import json

import pytest

needs_harness = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "nltk", "wonderwords")),
    reason="needs pip install '.[eval]'",
)


@needs_harness
@pytest.mark.slow
def test_niah_single_1_runs_on_a_checkpoint(finished_run, start, tmp_path):
    command = ["loglinear.cli.harness", "--model", "hf", "--tasks", "niah_single_1", "--device", "cpu", "--limit", "1"]
    settings = ["--metadata", '{"max_seq_lengths": [512]}', "--output_path", str(tmp_path), "--batch_size", "1"]
    model = ["--model_args", f"pretrained={finished_run},max_length=1024,dtype=float32"]
    process = start(*command, *settings, *model)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["niah_single_1"]["512,none"] == 0  # of 12 steps nobody learns
