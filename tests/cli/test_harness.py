"""`loglinear harness`: lm-eval's RULER task on a checkpoint, without a network."""

from __future__ import annotations

import importlib.util
import json
import os
import sys

import pytest
from ranks import process_of

from loglinear.cli import main
from loglinear.cli.offline import offline

needs_harness = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "nltk", "wonderwords")),
    reason="needs pip install '.[eval]'",
)


@needs_harness
@pytest.mark.slow
def test_niah_single_1_runs_on_a_checkpoint(finished_run, tmp_path):
    command = ["harness", "--offline", "--model", "hf", "--tasks", "niah_single_1", "--device", "cpu"]
    settings = ["--metadata", '{"max_seq_lengths": [512]}', "--output_path", str(tmp_path), "--batch_size", "1"]
    model = ["--limit", "1", "--model_args", f"pretrained={finished_run},max_length=1024,dtype=float32"]
    process = process_of([*command, *settings, *model], tmp_path / "printed")
    process.join(280)
    assert process.exitcode == 0, (tmp_path / "printed").read_text()
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["niah_single_1"]["512,none"] == 0  # of 12 steps nobody learns


@needs_harness
def test_help_is_that_of_the_harness(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit, match="0"):
        main(["harness", "--help"])
    assert "Language Model Evaluation Harness" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_nothing_is_offline_that_was_not_asked_for(name, monkeypatch):
    monkeypatch.setenv(name, "0")
    assert offline(["--tasks", "x"]) == ["--tasks", "x"]
    assert os.environ[name] == "0"
    assert offline(["--tasks", "--offline", "x"]) == ["--tasks", "x"]
    assert os.environ[name] == "1"
