"""Opening a checkpoint: what `evaluate`, `generate` and `demo` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

import loglinear.models  # noqa: F401 - registers the model with the Auto classes
from loglinear.tasks.lm.tokenizer import load_tokenizer
from loglinear.training.checkpoints import complete_checkpoints
from loglinear.training.record import read_record


@dataclass(frozen=True)
class Checkpoint:
    """A model in evaluation mode on its device, its tokenizer, and the record of its run if there is one."""

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    record: dict | None


def open_checkpoint(path: Path) -> Checkpoint:
    """The model in ``path``; for the folder of an unfinished run, its last complete checkpoint.

    Raises FileNotFoundError if there is neither.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it warns of texts longer than the context, which these models take
    folder = path
    if not (path / "config.json").exists():
        complete = complete_checkpoints(path)
        if not complete:
            raise FileNotFoundError(f"checkpoint: {path} holds no model (config.json) and no complete checkpoint")
        folder = complete[-1]
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.to(device)  # type: ignore[arg-type]
    record = read_record(folder) or read_record(folder.parent)
    return Checkpoint(folder, model, load_tokenizer(str(folder)), record)
