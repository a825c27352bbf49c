"""The record: one JSON file in the run's folder with the options of the run, the machine and the results.

It is also what makes "the same command goes on" safe: a restart compares its arguments and its data with the record.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from pathlib import Path

import torch
import yaml

from loglinear.tasks.lm.atomic import write_atomically
from loglinear.training.config import Contradiction

RECORD = "record.json"
OPTIONS = "config.yaml"
SHARES = ("batch_size", "accumulate", "processes")
# Other options that may change from one start of a run to the next; steps may grow.
FREE = ("fsdp", "context_parallel", "log_every", "save_every", "evaluate_every", "steps")


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


def write_options(folder: Path, options: dict) -> None:
    """Replace ``config.yaml`` in ``folder``: the options that repeat its run."""
    head = "# loglinear train --config THIS_FILE --output NEW_FOLDER does this run again.\n"
    write_atomically(folder / OPTIONS, head + yaml.safe_dump(options, sort_keys=False, allow_unicode=True))


def check_same_run(folder: Path, old: dict, new: dict) -> None:
    """Raise Contradiction naming every argument in which ``new`` cannot go on with the record in ``folder``.

    Raise ValueError if the arguments agree and the data behind them does not.
    """
    before, now = _deciding(old["arguments"]), _deciding(new["arguments"])
    differing = [
        f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if new["arguments"]["steps"] < old["arguments"]["steps"]:
        steps = f"{old['arguments']['steps']} and is now {new['arguments']['steps']}"
        differing.append(f"steps was {steps}, and a run may be given more steps but not fewer")
    way_out = "Give the recorded arguments to go on with that run, or another --output to start a new one."
    if differing:
        raise Contradiction(f"{folder / RECORD} records another run: {'; '.join(differing)}. {way_out}")
    if old["data"] != new["data"]:
        changed = "the text behind data or validation_data, or the tokenizer, has changed"
        raise ValueError(f"{folder / RECORD} records another run: {changed}. {way_out}")


def _deciding(arguments: dict) -> dict:
    """The arguments that a run keeps: the sequences of a step do not change, how processes share them out may."""
    others = {name: value for name, value in arguments.items() if name not in (*SHARES, *FREE)}
    sequences = math.prod(arguments.get(name, 1) for name in SHARES) // arguments.get("context_parallel", 1)
    return {**others, " x ".join(SHARES): sequences}


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, and the device."""
    packages = ("loglinear", "torch", "triton", "transformers", "accelerate", "tokenizers", "datasets")
    found = {name: _version(name) for name in packages} | {"torch": torch.__version__}  # which names its build too
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return {"python": platform.python_version(), **found, "device": device}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
