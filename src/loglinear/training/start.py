"""The start of a run: new, from the weights of another model (``init``), or from its own last checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from loglinear.models import LogLinearConfig, LogLinearForCausalLM, lift
from loglinear.models.foreign.options import is_foreign
from loglinear.tasks.lm.tokenizer import check_fits, load_tokenizer, tokenizer_hash
from loglinear.training.checkpoints import checkpoint_step, complete_checkpoints, model_folder, reading
from loglinear.training.config import Contradiction, ModelConfig, TrainConfig
from loglinear.training.model import build_model
from loglinear.training.record import RECORD, check_same_run, read_record


@dataclass(frozen=True)
class Start:
    """record: of the run in this folder, if this one goes on with it. checkpoint: its last complete one."""

    config: TrainConfig
    record: dict | None
    checkpoint: Path | None

    @cached_property
    def source(self) -> Path | None:
        """The folder whose model and tokenizer are taken: the run's own checkpoint, or that of ``init``."""
        if self.checkpoint is not None or self.config.init is None:
            return self.checkpoint
        return model_folder(self.config.init, "init")

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return 0 if self.checkpoint is None else checkpoint_step(self.checkpoint)

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The tokenizer of ``init``; None for a run that starts with new weights. Raises ValueError if none fits."""
        if self.config.init is None or self.source is None:
            return None
        if self.checkpoint is None:  # otherwise the record tells what has changed
            check_model(self.config, self.source)
        return initial_tokenizer(self.config, self.source)

    def model(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
        """The model to train, in float32."""
        set_seed(self.config.seed)
        if self.source is None:
            return build_model(self.config.model, tokenizer, self.config.data.context)
        with reading(self.source):
            found: Any = LogLinearForCausalLM.from_pretrained(
                self.source, dtype=torch.float32, output_loading_info=True
            )
        model, missing = found[0], found[1]["missing_keys"]
        if missing:
            raise ValueError(f"{self.source} has no weights for {sorted(missing)}")
        if self.config.lift and self.checkpoint is None:
            try:
                lift(model)
            except (TypeError, ValueError) as error:
                raise Contradiction(f"lift: {error}") from error
        return model

    def continued(self, record: dict) -> dict:
        """``record`` of this call with the past from the run's own record. Raises ValueError if it is another run."""
        if self.record is None:
            if self.config.init is not None and self.source is not None:
                record = {**record, "init": {"checkpoint": str(self.source), "weights": weights_hash(self.source)}}
            return record
        check_same_run(self.config.output, self.record, record)
        kept = {name: self.record[name] for name in ("init", "extended") if name in self.record}
        planned, steps = self.record["arguments"]["steps"], self.config.optimizer.steps
        if steps > planned:
            if self.checkpoint is None and self.record["status"] == "complete":
                output = self.config.output
                raise Contradiction(
                    f"steps: {output} has no checkpoint left to go on from after step {planned}; start a new run from its "
                    f"model: --init {output}, and another --output"
                )
            kept["extended"] = [*kept.get("extended", []), {"at_step": self.step, "steps": planned, "new_steps": steps}]
        return {**record, **kept}

    @property
    def is_complete(self) -> bool:
        """Whether the folder holds the outcome of all steps."""
        record = self.record or {"status": ""}
        return record["status"] == "complete" and record["arguments"]["steps"] == self.config.optimizer.steps


def find_start(config: TrainConfig) -> Start:
    """Where ``config`` starts. Files of a run that never saved a checkpoint do not count.

    Raises ValueError if ``output`` holds a model or checkpoints of which no record tells.
    """
    checkpoints = complete_checkpoints(config.output)
    if not checkpoints and not (config.output / "config.json").exists():
        return Start(config, None, None)
    record = read_record(config.output)
    if record is None:
        kind = "checkpoints" if checkpoints else "a model"
        raise ValueError(f"output: {config.output} has {kind} but no {RECORD}; choose another folder")
    return Start(config, record, checkpoints[-1] if checkpoints else None)


def model_options(folder: Path) -> dict[str, Any]:
    """The options of ``ModelConfig``, and ``vocab_size``, of the model in ``folder``."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = content.get("model_type")
    if kind != LogLinearConfig.model_type and not is_foreign(content):
        raise ValueError(f"init: {folder} holds a model of type {kind!r}: needs {LogLinearConfig.model_type!r}")
    config = LogLinearConfig.from_pretrained(folder)
    options = {field.name: getattr(config, field.name) for field in fields(ModelConfig)}
    mixer = options["mixer"]
    return {**options, "mixer": (mixer,) if isinstance(mixer, str) else tuple(mixer), "vocab_size": config.vocab_size}


def check_model(config: TrainConfig, folder: Path) -> None:
    """Raise Contradiction for an option of ``config`` that contradicts the model in ``folder``."""
    for name, have in model_options(folder).items():
        asked = getattr(config.data if name == "vocab_size" else config.model, name)
        if asked is not None and asked != have:
            asked, have = (" ".join(value) if isinstance(value, tuple) else value for value in (asked, have))
            raise Contradiction(f"{name} must be {have}, as the model of init={config.init} has it: got {asked}")


def initial_tokenizer(config: TrainConfig, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in ``folder``, or that of ``config`` where there is none; it must be one that the model knows."""
    own = load_tokenizer(str(folder)) if (folder / "tokenizer.json").exists() else None
    named = None if config.data.tokenizer is None else load_tokenizer(config.data.tokenizer)
    if own is not None and named is not None and tokenizer_hash(own) != tokenizer_hash(named):
        raise Contradiction(f"tokenizer must be that of init={config.init}: got {config.data.tokenizer!r}, another one")
    tokenizer = named if own is None else own
    if tokenizer is None:
        raise Contradiction(
            f"tokenizer: needed, because {folder} (init) holds none; name the one that it was trained with"
        )
    record = read_record(folder) or read_record(folder.parent) or {}
    try:
        check_fits(tokenizer, LogLinearConfig.from_pretrained(folder), record.get("data", {}).get("tokenizer_hash"))
    except ValueError as error:
        raise Contradiction(str(error)) from error
    return tokenizer


def weights_hash(folder: Path) -> str:
    """Identity of the weights in ``folder``."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()
