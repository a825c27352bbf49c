"""A checkpoint, and the text of its run by the record beside it.

`evaluate`, `niah`, `generate` and `demo` share this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

import loglinear.models  # noqa: F401 - registers the model with the Auto classes
from loglinear.tasks.lm.config import Data, DataConfig, names_of
from loglinear.tasks.lm.documents import Source
from loglinear.tasks.lm.tokenizer import check_fits, load_tokenizer
from loglinear.training.checkpoints import model_folder, reading
from loglinear.training.config import Contradiction
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

    Raises FileNotFoundError if there is neither, ValueError for a tokenizer that is not the model's.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # transformers warns of texts beyond the context, but these models take them
    folder = model_folder(path, "checkpoint")
    record = read_record(folder) or read_record(folder.parent)
    tokenizer = load_tokenizer(str(folder))
    check_fits(tokenizer, AutoConfig.from_pretrained(folder), (record or {}).get("data", {}).get("tokenizer_hash"))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    with reading(folder):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.to(device)  # type: ignore[arg-type]
    return Checkpoint(folder, model, tokenizer, record)


def check_checkpoints(arguments: Sequence[str]) -> None:
    """Raise ValueError if ``arguments`` of another program name a checkpoint with a tokenizer that is not the model's.

    A checkpoint is named as FOLDER or as lm-eval's pretrained=FOLDER,tokenizer=FOLDER. A folder whose tokenizer does not
    load is left to the other program.
    """
    for word in arguments:
        settings = dict(part.partition("=")[::2] for part in word.removeprefix("--model_args=").split(","))
        folder = Path(settings.get("pretrained", word))
        if not (folder / "config.json").is_file():
            continue
        record = read_record(folder) or read_record(folder.parent) or {}
        try:
            tokenizer = load_tokenizer(settings.get("tokenizer", str(folder)))
        except ValueError:
            continue
        try:
            check_fits(tokenizer, AutoConfig.from_pretrained(folder), record.get("data", {}).get("tokenizer_hash"))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error


class TextOptions(Protocol):
    """The options of a command that concern the text; None stands for the value of the training run."""

    @property
    def data(self) -> Data | None: ...
    @property
    def suffixes(self) -> tuple[str, ...] | None: ...
    @property
    def text_field(self) -> str | None: ...
    @property
    def streaming(self) -> bool: ...
    @property
    def max_documents(self) -> int | None: ...
    @property
    def cache(self) -> Path: ...


def open_text(options: TextOptions, trained: dict, of_run: Data | None, validation_fraction: float) -> Source:
    """The text that ``options`` name, otherwise ``of_run``, read as the run's arguments ``trained`` tell.

    Raises Contradiction if neither names a text, or if the options would read the run's own text in another way than the
    run did.
    """
    own = options.data is None
    data = of_run if options.data is None else options.data
    if data is None:
        raise Contradiction("data: needed, because no record beside the checkpoint tells what it was trained on")
    if own and (options.streaming or options.max_documents is not None):
        raise Contradiction(
            "data: needed with streaming or max_documents; for the text of the run its record tells both"
        )
    streaming = trained.get("streaming", False) if own else options.streaming
    return Source(
        names_of(data),
        options.suffixes or tuple(trained.get("suffixes", DataConfig.suffixes)),
        options.text_field or trained.get("text_field", DataConfig.text_field),
        validation_fraction,
        trained.get("max_documents") if own else options.max_documents,
        options.cache if streaming else None,
    )
