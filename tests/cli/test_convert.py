"""``loglinear convert``, and the commands that take what it wrote, or the original itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config

from loglinear.cli import main
from loglinear.models import LogLinearForCausalLM
from loglinear.tasks.lm.tokenizer import train_tokenizer
from loglinear.training.start import is_ours

PUBLISHED = Path(__file__).parents[1] / "models" / "foreign" / "checkpoints" / "h_gated_deltanet"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """The tiny checkpoint with a vocabulary that has room for a tokenizer, and the tokenizer."""
    folder = tmp_path_factory.mktemp("original")
    tokenizer = train_tokenizer(["alpha beta gamma " * 20], 280)
    tokenizer.save_pretrained(folder)
    tensors = load_file(PUBLISHED / "model.safetensors")
    for name in ("lm_head.weight", "model.embeddings.weight"):
        tensors[name] = torch.cat([tensors[name]] * 3)[: len(tokenizer)].contiguous()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((PUBLISHED / "config.json").read_text()) | {"vocab_size": len(tokenizer)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("converted", [True, False], ids=["converted", "original"])
def test_the_commands_take_it(original, converted, texts, tmp_path, capsys):
    """train goes on from it, and generate and evaluate open it."""
    folder = original
    if converted:
        folder = tmp_path / "converted"
        assert main(["convert", str(original.parent), "--subfolder", original.name, "--output", str(folder)]) == 0
        said = capsys.readouterr().out
        assert said.startswith("h_gated_deltanet as log_linear_gated_deltanet: ")
        assert "tokenizer.json" in said
    data = ["--data", str(texts), "--context", "32", "--cache", str(tmp_path / "cache"), "--batch-size", "2"]
    run = ["train", "--init", str(folder), "--output", str(tmp_path / "run"), "--steps", "1", "--learning-rate", "0"]
    assert main([*run, *data, "--log-every", "1"]) == 0
    trained, start = (LogLinearForCausalLM.from_pretrained(path) for path in (tmp_path / "run", folder))
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters(), strict=True))
    assert main(["generate", str(folder), "--prompt", "alpha beta", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.split("\n")[-2].startswith("alpha beta")
    text = ["--data", str(texts), "--context", "32", "--output", str(tmp_path / "measures")]
    assert main(["evaluate", str(folder), *text]) == 0


def test_a_model_type_of_transformers_is_no_model_of_ours(tmp_path):
    """``mamba2`` is in the table of layouts, and the Auto classes open it as transformers' own."""
    Mamba2Config(hidden_size=16, num_heads=4, head_dim=8).save_pretrained(tmp_path)
    assert not is_ours(tmp_path)
    assert is_ours(PUBLISHED)


def test_errors_are_one_line(original, tmp_path, capsys):
    assert main(["convert", str(original), "--output", str(original)]) == 1
    assert capsys.readouterr().err.startswith(f"loglinear convert: --output: {original} holds a model")
    assert main(["convert", str(original), "--output", str(tmp_path / "new"), "--max-shard-gb", "0"]) == 2
    assert "--max-shard-gb must be above 0: got 0.0" in capsys.readouterr().err
    assert main(["convert", str(tmp_path), "--output", str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
