"""A small text to train on, the options of a run of seconds, and one finished run that several tests look at."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from loglinear.cli import main

DATA = ["--context", "32", "--vocab-size", "300", "--validation-fraction", "0.2"]
MODEL = ["--hidden-size", "16", "--num-hidden-layers", "1", "--mamba-head-dim", "8", "--mamba-state-size", "8"]
STEPS = ["--batch-size", "2", "--log-every", "1"]


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder of 15 short texts with some structure to learn."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "plus", "minus", "equals", "(", ")", "\n"]
    for i in range(15):
        (folder / f"{i:02}.txt").write_text(" ".join(rng.choices(words, k=200)))
    return folder


@pytest.fixture(scope="session")
def train_options(texts, tmp_path_factory) -> list[str]:
    """Everything that `train` needs but --output and --steps."""
    cache = tmp_path_factory.mktemp("cache")
    return ["train", "--data", str(texts), "--cache", str(cache), *DATA, *MODEL, *STEPS]


@pytest.fixture(scope="session")
def finished_options(train_options) -> list[str]:
    """The command behind `finished_run`, without its --output."""
    return [*train_options, "--steps", "12", "--save-every", "4", "--evaluate-every", "6"]


@pytest.fixture(scope="session")
def finished_run(finished_options, tmp_path_factory) -> Path:
    """The folder of a complete run of 12 steps, of which checkpoints 8 and 12 are left. Tests only read it."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert main([*finished_options, "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="session")
def start():
    """A function that starts ``python -m ...`` in a process of its own."""
    return _start


def _start(*command: str) -> subprocess.Popen:
    """The command line in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
