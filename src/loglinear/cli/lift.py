"""``loglinear lift``: write a linear model as a log-linear one that gives the same outputs until it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from loglinear.training.config import Contradiction

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from loglinear.models import LiftReport


@dataclass(frozen=True)
class LiftArgs:
    """Make the linear mixers of a model log-linear. λ is 1 on every level at first, so the model stays the same."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder of a run or of one of its checkpoints, or folder or Hugging Face name of any model with linear mixers."""
    output: Path
    """New folder for the lifted model, which train --init, evaluate, niah and generate take."""
    num_levels: int | None = None
    """Levels with a λ of their own; none: as many as the longest context of the model needs."""
    levels: Path | None = None
    """A file of levels that were trained on this model: put them on it."""
    levels_only: bool = False
    """Write the new parameters alone, levels.safetensors. A model that is lifted already is taken, too."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; auto: as they were saved."""

    def __post_init__(self) -> None:
        if self.num_levels is not None and self.num_levels < 1:
            raise ValueError(f"num_levels must be at least 1: got {self.num_levels}")
        if self.levels is not None and self.num_levels is not None:
            raise ValueError("num_levels must be left out with levels, whose file tells it")


def lift(args: LiftArgs) -> LiftReport:
    """Write the lifted model, its tokenizer and record, or its levels alone; print and return the report."""
    from rich.console import Console
    from transformers.utils import logging

    from loglinear.models.levels_file import LEVELS_FILE, save_levels
    from loglinear.training.disk import writing_to

    console = Console(soft_wrap=True)
    logging.disable_progress_bar()
    if args.output.exists() and any(args.output.iterdir()):
        raise ValueError(f"output: {args.output} is not empty; choose another folder")
    folder = _folder(args.model)
    model = _load(folder, args.dtype)
    report = _lifted(model, args)
    console.print(str(report))
    args.output.mkdir(parents=True, exist_ok=True)
    with writing_to(args.output):
        if args.levels_only:
            save_levels(model, args.output / LEVELS_FILE)
            console.print(f"the levels: {args.output / LEVELS_FILE}")
        else:
            model.save_pretrained(args.output)
            _copy_tokenizer(folder, args.output, console)
            _write_record(args, folder, report)
            console.print(f"the lifted model: {args.output}")
    return report


def _folder(name: str) -> str:
    """The folder of the model called ``name``; a name that is no folder is one of Hugging Face."""
    from loglinear.training.checkpoints import model_folder

    path = Path(name).expanduser()
    return str(model_folder(path, "model")) if path.is_dir() else name


def _load(folder: str, dtype: str) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    import loglinear.models  # noqa: F401 - registers the model with the Auto classes
    from loglinear.training.checkpoints import reading

    config = AutoConfig.from_pretrained(folder)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model: {folder} holds one of type {config.model_type!r}: needs a causal language model")
    with reading(Path(folder)):
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto" if dtype == "auto" else getattr(torch, dtype), output_loading_info=True
        )
    model, missing = found[0], sorted(found[1]["missing_keys"])
    if missing:
        raise ValueError(f"model: {folder} has no weights for {len(missing)} parameters, as {', '.join(missing[:3])}")
    return model


def _lifted(model: PreTrainedModel, args: LiftArgs) -> LiftReport:
    """Lift ``model`` as the options say. Raises Contradiction for levels of another model, and for a model without mixers."""
    from loglinear.models import LiftReport, load_levels
    from loglinear.models import lift as run
    from loglinear.models.levels import level_scales

    try:
        if args.levels is not None:
            return load_levels(model, args.levels)
        if args.levels_only and level_scales(model):
            return LiftReport(before=model.num_parameters())
        return run(model, args.num_levels)
    except (TypeError, ValueError) as error:
        raise Contradiction(str(error)) from error


def _copy_tokenizer(folder: str, output: Path, console: Console) -> None:
    """Save the tokenizer of ``folder`` beside the lifted model, or print that the folder has no tokenizer."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder).save_pretrained(output)
    except (OSError, ValueError):
        console.print(f"{folder} holds no tokenizer that loads: none is saved")


def _write_record(args: LiftArgs, folder: str, report: LiftReport) -> None:
    """Write a record for a run of this library: the record of the run before and, under "lift", this command."""
    from loglinear.training.record import read_record, versions, write_record

    before = read_record(Path(folder)) or read_record(Path(folder).parent)
    if before is None:
        return
    # The metrics in it are those of the linear model.
    kept = {name: before.get(name, {}) for name in ("arguments", "data", "model")}
    lifted = {"checkpoint": folder, "layers": report.lifted, "added": report.added, "versions": versions()}
    write_record(args.output, {"status": "complete", **kept, "lift": lifted})
