"""`loglinear train --context-parallel`: the losses and weights of one process that sees the same sequences."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from processes import on_ranks
from safetensors.torch import load_file

from loglinear.cli import main

MODEL = ["--hidden-size", "16", "--num-hidden-layers", "2", "--mamba-head-dim", "8", "--mamba-state-size", "8"]
MIXERS = ["--mixer", "log_linear_mamba2", "log_linear_gated_deltanet", "--delta-num-heads", "2"]
STEPS = ["--steps", "4", "--save-every", "2", "--evaluate-every", "2", "--log-every", "1", "--accumulate", "2"]


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """Of a run on a short text. Both sides of it end in a batch that is not full."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    for i in range(15):
        (folder / f"{i:02}.txt").write_text(" ".join(rng.choices(["alpha", "beta", "gamma", "=", "(", "\n"], k=300)))
    data = ["--data", str(folder), "--cache", str(folder / "cache"), "--vocab-size", "300", "--context", "128"]
    return ["train", *data, "--validation-fraction", "0.2", *MODEL, *MIXERS, *STEPS]


@pytest.fixture(scope="module")
def single(options, tmp_path_factory) -> Path:
    """The run of one process, four sequences a pass."""
    output = tmp_path_factory.mktemp("runs") / "single"
    assert main([*options, "--batch-size", "4", "--output", str(output)]) == 0
    return output


def one_process(rank: int, options: list[str]) -> int:
    return main(options)


def train_on_ranks(count: int, batch_size: int, options: list[str], output: Path) -> None:
    """Pairs of processes share a sequence."""
    command = [*options, "--context-parallel", "2", "--batch-size", str(batch_size), "--output", str(output)]
    assert on_ranks(count, one_process, command) == [0] * count


def record(run: Path) -> dict:
    return json.loads((run / "record.json").read_text())


def assert_same_losses(run: Path, expected: Path, last: int = 4) -> None:
    """To step ``last``, of training and validation."""
    for name in ("loss", "eval_loss"):
        have, want = (
            {x["step"]: x[name] for x in record(folder)["history"] if name in x and x["step"] <= last}
            for folder in (run, expected)
        )
        assert want
        assert have == pytest.approx(want, rel=1e-5)


def assert_same_outcome(run: Path, expected: Path) -> None:
    assert_same_losses(run, expected)
    weights, others = (load_file(folder / "model.safetensors") for folder in (run, expected))
    for name, value in others.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-2, atol=1e-4)


def test_two_processes_with_one_sequence_are_one_process_and_go_on_as_it_does(options, single, tmp_path):
    run = tmp_path / "run"
    train_on_ranks(2, 4, options, run)
    assert_same_outcome(run, single)
    content = record(run)
    shutil.rmtree(run / "checkpoint-4")
    (run / "record.json").write_text(json.dumps(content | {"status": "running"}))
    train_on_ranks(2, 4, options, run)
    assert_same_outcome(run, single)


@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=["replicated", "sharded"])
def test_two_pairs_of_processes_take_twice_the_sequences_of_one(more, options, single, tmp_path):
    run = tmp_path / "run"
    train_on_ranks(4, 2, [*options, *more], run)
    assert_same_losses(run, single, last=3)  # then the epoch ends: sequences that fill up its last step
    if more:  # a sharded run goes on in two processes with a whole model each
        content = record(run)
        shutil.rmtree(run / "checkpoint-4")
        (run / "record.json").write_text(json.dumps(content | {"status": "running"}))
        train_on_ranks(2, 4, options, run)
        assert_same_losses(run, single, last=3)


def test_processes_that_are_missing_are_named(options, tmp_path, capsys):
    assert main([*options, "--output", str(tmp_path / "run"), "--context-parallel", "2"]) == 1
    wanted = "--context-parallel: needs a number of processes divisible by 2 (torchrun): got 1"
    assert wanted in capsys.readouterr().err
