"""The record: one JSON file in the run's folder that says what the run is, on what it ran, and what came out.

It is also what makes "the same command goes on" safe: a restart compares its arguments and its data with the record.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from pathlib import Path

import torch

from loglinear.tasks.lm.atomic import write_atomically

RECORD = "record.json"
SHARES = ("batch_size", "accumulate", "processes")


def read_record(folder: Path) -> dict | None:
    """The record in ``folder``, None if there is none."""
    path = folder / RECORD
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{path} is not a whole record: {error}") from error


def write_record(folder: Path, record: dict) -> None:
    """Replace the record in ``folder``, all at once."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RECORD, json.dumps(record, indent=2) + "\n")


def check_same_run(folder: Path, old: dict, new: dict) -> None:
    """Raise ValueError naming every argument, or the data, in which ``new`` differs from the record in ``folder``."""
    before, now = _deciding(old["arguments"]), _deciding(new["arguments"])
    differing = [
        f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if not differing and old["data"] != new["data"]:
        differing = ["the text behind data or validation_data, or the tokenizer, has changed"]
    if differing:
        raise ValueError(
            f"{folder / RECORD} records another run: {'; '.join(differing)}. "
            "Give the recorded arguments to go on with that run, or another --output to start a new one."
        )


def _deciding(arguments: dict) -> dict:
    """The arguments that decide the result: the sequences of a step do, how processes share them out does not."""
    others = {name: value for name, value in arguments.items() if name not in (*SHARES, "fsdp", "context_parallel")}
    sequences = math.prod(arguments.get(name, 1) for name in SHARES) // arguments.get("context_parallel", 1)
    return {**others, " x ".join(SHARES): sequences}


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, and the device."""
    packages = ("loglinear", "torch", "triton", "transformers", "accelerate", "tokenizers", "datasets")
    found = {name: _version(name) for name in packages}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return {"python": platform.python_version(), **found, "device": device}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
