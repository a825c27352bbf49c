"""One run from a TrainConfig to a folder with a model; the same call again goes on where the last one stopped.

    arguments -> data -> record -> model -> train, from the last complete checkpoint -> evaluate -> save -> record

The order of the data depends on the seed and the step only, and a checkpoint holds the optimizer, the schedule and the
random states, so an interrupted run and an unbroken one see the same batches and reach the same losses. It may go on with
more processes or fewer, as long as a step takes as many sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from torch.distributed import ProcessGroup
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.utils.logging import disable_progress_bar

from loglinear.layers import set_context_group
from loglinear.tasks.lm.data import TextData, load_data
from loglinear.training.checkpoints import (
    MarkComplete,
    checkpoint_step,
    complete_checkpoints,
    remove_incomplete_checkpoints,
)
from loglinear.training.config import TrainConfig
from loglinear.training.context import ContextTrainer, join_context_group
from loglinear.training.model import build_model, compile_blocks
from loglinear.training.progress import Meter, ShowProgress
from loglinear.training.record import RECORD, check_same_run, read_record, versions, write_record
from loglinear.training.sharding import ShardedTrainer
from loglinear.training.trainer import LanguageModelTrainer, training_arguments


def train(config: TrainConfig, console: Console) -> dict:
    """Run ``config`` to its end and return the record, whose ``metrics`` hold the validation loss and perplexity.

    Every process of ``torchrun`` calls this. A run that is complete already is left alone and its record returned.
    Raises ValueError for arguments or data that differ from those recorded in ``config.output``.
    """
    arguments = training_arguments(config)
    first_process = arguments.process_index == 0
    console = console if first_process else Console(quiet=True)
    disable_progress_bar()  # transformers' own, one for every file it saves
    group = join_context_group(config, arguments)
    with console.status("reading and tokenizing the data"), arguments.main_process_first(desc="reading the data"):
        data = load_data(config.data)
    record = {
        "status": "running",
        "arguments": {**config.arguments(), "processes": arguments.world_size},
        "data": data.describe(),
        "versions": versions(),
    }
    old_record = read_record(config.output)
    checkpoints = complete_checkpoints(config.output)
    if old_record is not None:
        check_same_run(config.output, old_record, record)
        if old_record["status"] == "complete":
            console.print(f"{config.output} holds this run already, complete: nothing to do.")
            return old_record
    elif checkpoints:
        raise ValueError(f"output: {config.output} has checkpoints but no {RECORD}; choose another folder")
    _report(data, console)

    last = checkpoints[-1] if checkpoints else None
    model = _initial_model(config, data, last)
    if group is not None:
        set_context_group(model, group)
    if config.compile:
        compile_blocks(model, fullgraph=group is None)
    record["model"] = {"parameters": model.num_parameters(), "config": model.config.to_diff_dict()}
    if first_process:
        for unfinished in remove_incomplete_checkpoints(config.output):
            console.print(f"removed {unfinished}, which a killed run left half-written")
        write_record(config.output, record)
    console.print(f"{model.num_parameters():,} parameters; {'new run' if last is None else f'going on from {last}'}")
    with ShowProgress(console) as progress:
        trainer = _trainer(config, arguments, group, model, data, [progress, *_writers(config, record, last)])
        _train_from(trainer, last, config.optimizer.steps)
    metrics = _finish(trainer, config.output)
    record |= {"status": "complete", "metrics": metrics, "history": trainer.state.log_history}
    if first_process:
        write_record(config.output, record)
    for name, value in metrics.items():
        console.print(f"{name.replace('_', ' ')} {value:.4f}")
    console.print(f"the model, {RECORD} and the TensorBoard logs: {config.output}")
    return record


def _initial_model(config: TrainConfig, data: TextData, last: Path | None) -> PreTrainedModel:
    """A new model, or the trained one when only the end of the run is missing."""
    if last is not None and checkpoint_step(last) == config.optimizer.steps:
        return AutoModelForCausalLM.from_pretrained(last)
    set_seed(config.seed)
    return build_model(config.model, data.tokenizer, config.data.context)


def _writers(config: TrainConfig, record: dict, last: Path | None) -> list[TrainerCallback]:
    """What the run leaves on the disk beside the Trainer's checkpoints."""

    def write_history(history: list[dict]) -> None:
        write_record(config.output, {**record, "history": history})

    tensorboard = TensorBoardCallback()
    if PartialState().is_main_process:
        # Steps after the last checkpoint are taken again: their first values are withdrawn.
        first_step = 0 if last is None else checkpoint_step(last) + 1
        tensorboard.tb_writer = SummaryWriter(str(config.output / "tensorboard"), purge_step=first_step)
    return [tensorboard, MarkComplete(write_history)]


def _trainer(
    config: TrainConfig,
    arguments: TrainingArguments,
    group: ProcessGroup | None,
    model: PreTrainedModel,
    data: TextData,
    callbacks: list[TrainerCallback],
) -> LanguageModelTrainer:
    optimizer = config.optimizer
    tokens_per_step = optimizer.batch_size * optimizer.accumulate * config.data.context * arguments.world_size
    kind: Callable[..., LanguageModelTrainer] = ShardedTrainer if config.fsdp else LanguageModelTrainer
    trainer = (kind if group is None else partial(ContextTrainer, context_group=group))(
        model,
        arguments,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        data_collator=default_data_collator,
        callbacks=callbacks,
        meter=Meter(tokens_per_step // config.context_parallel),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _train_from(trainer: LanguageModelTrainer, last: Path | None, steps: int) -> None:
    if last is not None and checkpoint_step(last) == steps:
        # The Trainer would take one step too many; the model is this checkpoint's already.
        trainer.state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
        return
    trainer.train(resume_from_checkpoint=None if last is None else str(last))


def _finish(trainer: LanguageModelTrainer, output: Path) -> dict[str, float]:
    """Save the model where ``from_pretrained`` finds it, and return its metrics."""
    metrics = {}
    if trainer.eval_dataset is not None:
        step, history = trainer.state.global_step, trainer.state.log_history
        done = [log["eval_loss"] for log in history if "eval_loss" in log and log["step"] == step]
        loss = done[0] if done else trainer.evaluate()["eval_loss"]
        metrics = {"validation_loss": loss, "validation_perplexity": math.exp(loss)}
    # The Trainer turns the cache off for training; whoever loads the model will want to generate.
    trainer.accelerator.unwrap_model(trainer.model).config.use_cache = True
    trainer.save_model(str(output))
    return metrics


def _report(data: TextData, console: Console) -> None:
    for name, windows in (("training", data.train), ("validation", data.validation)):
        if windows is not None:
            counts = windows.describe()
            console.print(
                f"{name}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {counts['sequences']:,} "
                f"sequences of {windows.context:,}; {counts['tail_tokens']:,} tokens left over"
            )
