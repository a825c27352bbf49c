"""The start of a run: new, from the weights of another model (``init``), or from its own last checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from loglinear.models import LogLinearConfig, lift
from loglinear.models.foreign.options import is_foreign
from loglinear.models.levels import level_scales, train_only
from loglinear.tasks.lm.config import DataConfig
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
            found: Any = AutoModelForCausalLM.from_pretrained(
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
        if self.config.train == "levels" and not level_scales(model):
            raise Contradiction(f"train: levels needs a log-linear model or --lift: {self.source} is neither")
        train_only(model, self.config.train)
        return model

    def own_options(self, options: dict) -> dict:
        """``options`` of this run; without those of a model of ours if the model of ``init`` is of another package."""
        if self.source is None or is_ours(self.source):
            return options
        return {name: value for name, value in options.items() if name not in MODEL_OPTIONS}

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


MODEL_OPTIONS = (*(field.name for field in fields(ModelConfig)), "vocab_size")


def is_ours(folder: Path) -> bool:
    """Whether the Auto classes open ``folder`` as a model of this package: its own, or one of another library's layout."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not is_foreign(content):
        return content.get("model_type") == LogLinearConfig.model_type
    return isinstance(AutoConfig.from_pretrained(folder), LogLinearConfig)  # mamba2 is transformers' own


def model_options(folder: Path) -> dict[str, Any]:
    """The options of ``ModelConfig``, and ``vocab_size``, of the model in ``folder``; none for a model of another package."""
    if not is_ours(folder):
        return {}
    config = LogLinearConfig.from_pretrained(folder)
    options = {name: getattr(config, name) for name in MODEL_OPTIONS}
    mixer = options["mixer"]
    return {**options, "mixer": (mixer,) if isinstance(mixer, str) else tuple(mixer)}


def check_model(config: TrainConfig, folder: Path) -> None:
    """Raise Contradiction for an option of ``config`` that contradicts the model in ``folder``."""
    asked_for = asdict(config.model) | {"vocab_size": config.data.vocab_size}
    own = model_options(folder)
    if not own:
        _check_other_model(config, folder, asked_for)
    for name, have in own.items():
        asked = asked_for[name]
        if asked is not None and asked != have:
            asked, have = (" ".join(value) if isinstance(value, tuple) else value for value in (asked, have))
            raise Contradiction(f"{name} must be {have}, as the model of init={config.init} has it: got {asked}")


def _check_other_model(config: TrainConfig, folder: Path, asked_for: dict[str, Any]) -> None:
    """``check_model`` for a model of another package, whose sizes are no options."""
    found = AutoConfig.from_pretrained(folder)
    kind = found.model_type
    if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"init: {folder} holds a model of type {kind!r}: needs a causal language model")
    defaults = asdict(ModelConfig()) | {"vocab_size": DataConfig.vocab_size}
    for name, asked in asked_for.items():
        if asked != defaults[name]:
            raise Contradiction(f"{name} must be left out: the model of init={config.init} is of type {kind!r}")
    if config.context_parallel > 1:
        raise Contradiction(
            f"context_parallel must be 1: the model of init={config.init} is of type {kind!r}, which takes whole sequences"
        )


def initial_tokenizer(config: TrainConfig, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in ``folder``, or that of ``config`` where there is none; it must be one that the model knows."""
    files = (folder / name for name in ("tokenizer.json", "tokenizer_config.json"))
    own = load_tokenizer(str(folder)) if any(file.exists() for file in files) else None
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
        check_fits(tokenizer, AutoConfig.from_pretrained(folder), record.get("data", {}).get("tokenizer_hash"))
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
