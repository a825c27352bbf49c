"""Checkpoints that can be trusted: a folder counts only once a mark says that everything in it is on the disk.

The Trainer writes a checkpoint file by file under its final name, so a run killed in between leaves one that looks
usable. The mark is written last, after all processes are done, and only then are old checkpoints deleted, mark first.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from safetensors import SafetensorError
from transformers import TrainerCallback

MARK = "complete"
KEPT = 2


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((path for path in _checkpoints(folder) if (path / MARK).exists()), key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Optimizer steps done when this checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def model_folder(path: Path, name: str) -> Path:
    """``path`` if it holds a model; for the folder of an unfinished run, its last complete checkpoint.

    Raises FileNotFoundError naming the argument ``name`` if there is neither.
    """
    if (path / "config.json").exists():
        return path
    complete = complete_checkpoints(path)
    if not complete:
        raise FileNotFoundError(f"{name}: {path} holds no model (config.json) and no complete checkpoint")
    return complete[-1]


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Let an error of reading weights name ``folder``, whose files are damaged."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{folder} holds weights that cannot be read: {error}") from error


def remove_incomplete_checkpoints(folder: Path) -> list[Path]:
    """Delete what a killed run left half-written, and return it."""
    unfinished = [path for path in _checkpoints(folder) if not (path / MARK).exists()]
    for path in unfinished:
        shutil.rmtree(path)
    return unfinished


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


class MarkComplete(TrainerCallback):
    """After each save: mark the checkpoint, hand the history to ``then``, and delete all but the last two checkpoints."""

    def __init__(self, then: Callable[[list[dict]], None]):
        self.then = then

    def on_save(self, args, state, control, **kwargs) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            for path in checkpoint.rglob("*"):
                _flush(path)
                # Early versions of torch.save lose the last bytes on a full disk without a word.
                if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
                    raise OSError(f"output: {path} was not written whole; the disk may be full")
            (checkpoint / MARK).touch()
            _flush(checkpoint)
            self.then(state.log_history)
            for old in complete_checkpoints(Path(args.output_dir))[:-KEPT]:
                (old / MARK).unlink()
                shutil.rmtree(old)


def _flush(path: Path) -> None:
    """Ask the system to write a file or folder to the disk: a machine that stops is a kill too."""
    if path.is_dir() and sys.platform == "win32":
        return  # Windows opens no folders, and keeps their entries in its journal
    # Windows flushes only what is open for writing, and nobody opens a folder for that.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
