"""One run from a TrainConfig to a folder with a model; the same call again goes on where the last one stopped.

    arguments -> start -> data -> record -> model -> train, from the last complete checkpoint -> evaluate -> save -> record

The order of the data depends on the seed and the step only, and a checkpoint holds the optimizer, the schedule and the
random states, so an interrupted run and an unbroken one see the same batches and reach the same losses. It may go on with
more processes or fewer, as long as a step takes as many sequences, and with more steps.
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
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.utils.logging import disable_progress_bar

from loglinear.layers import set_context_group
from loglinear.tasks.lm.data import TextData, load_data
from loglinear.training.checkpoints import MarkComplete, remove_incomplete_checkpoints
from loglinear.training.config import TrainConfig
from loglinear.training.context import ContextTrainer, join_context_group
from loglinear.training.disk import writing_to
from loglinear.training.model import compile_blocks, longest_context
from loglinear.training.progress import Meter, ShowProgress
from loglinear.training.record import RECORD, versions, write_options, write_record
from loglinear.training.sharding import ShardedTrainer
from loglinear.training.sigterm import EXIT_STATUS, StopAtSigterm
from loglinear.training.start import Start, find_start
from loglinear.training.trainer import LanguageModelTrainer, training_arguments


def train(config: TrainConfig, console: Console) -> dict:
    """Run ``config`` to its end and return the record, whose ``metrics`` hold the validation loss and perplexity.

    Every process of ``torchrun`` calls this. A run that is complete already is left alone and its record returned.
    Raises ValueError for arguments or data that differ from those recorded in ``config.output``, OSError naming the folder
    that cannot be written, and SystemExit(143) after SIGTERM, when a checkpoint is saved.
    """
    arguments = training_arguments(config)
    first_process = arguments.process_index == 0
    console = console if first_process else Console(quiet=True)
    disable_progress_bar()  # transformers' own, one for every file it saves
    group = join_context_group(config, arguments)
    start = find_start(config)
    with console.status("reading and tokenizing the data"), arguments.main_process_first(desc="reading the data"):
        data = load_data(config.data, start.tokenizer())
    record = start.continued(
        {
            "status": "running",
            "arguments": {**start.own_options(config.arguments()), "processes": arguments.world_size},
            "cache": str(config.data.cache),
            "data": data.describe(),
            "versions": versions(),
        }
    )
    if start.is_complete:
        console.print(f"{config.output} holds this run already, complete: nothing to do.")
        return start.record or {}
    _report(data, console)

    model = start.model(data.tokenizer)
    if group is not None:
        set_context_group(model, group)
    if config.compile:
        compile_blocks(model, fullgraph=group is None)
    record["model"] = {"parameters": model.num_parameters(), "config": model.config.to_diff_dict()}
    with writing_to(config.output):
        if first_process:
            for unfinished in remove_incomplete_checkpoints(config.output):
                console.print(f"removed {unfinished}, which a killed run left half-written")
            write_record(config.output, record)
            write_options(config.output, start.own_options(config.options()))
        _announce(start, model, console)
        with ShowProgress(console) as progress, StopAtSigterm() as stop:
            callbacks = [progress, *_writers(config, record, start), stop]
            trainer = _trainer(config, arguments, group, model, data, callbacks)
            _train_from(trainer, start)
        if stop.told:
            console.print(f"stopped by SIGTERM after step {trainer.state.global_step}, which is saved")
            raise SystemExit(EXIT_STATUS)
        metrics = _finish(trainer, config.output)
        record |= {"status": "complete", "metrics": metrics, "history": trainer.state.log_history}
        if first_process:
            write_record(config.output, record)
    for name, value in metrics.items():
        console.print(f"{name.replace('_', ' ')} {value:.4f}")
    console.print(f"the model, {RECORD} and the TensorBoard logs: {config.output}")
    return record


def _announce(start: Start, model: PreTrainedModel, console: Console) -> None:
    """Print the model that is trained, and where the run starts."""
    config = start.config
    place = "new run"
    if start.checkpoint is not None:
        place = f"going on from {start.checkpoint}"
    elif start.source is not None:
        place = f"new run with the weights of {start.source}"
    trained = model.num_parameters(only_trainable=True)
    some = f", of which {trained:,} are trained" if trained < model.num_parameters() else ""
    console.print(f"{model.num_parameters():,} parameters{some}; {place}")
    if start.record is not None and start.record["arguments"]["steps"] < config.optimizer.steps:
        console.print(
            f"steps: {start.record['arguments']['steps']} become {config.optimizer.steps}, and the learning rate goes on "
            "along their cosine"
        )
    longest = longest_context(model)
    if longest is not None and config.data.context > longest:
        console.print(f"context: beyond the {longest} tokens of the model, which reads further levels as its last")


def _writers(config: TrainConfig, record: dict, start: Start) -> list[TrainerCallback]:
    """Callbacks that write the files of the run beside the Trainer's checkpoints."""

    def write_history(history: list[dict]) -> None:
        write_record(config.output, {**record, "history": history})

    tensorboard = TensorBoardCallback()
    if PartialState().is_main_process:
        # Steps after the last checkpoint are taken again: their first values are withdrawn.
        first_step = 0 if start.checkpoint is None else start.step + 1
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
    trainer = trainer_kind(config.fsdp, group)(
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


def trainer_kind(fsdp: bool, group: ProcessGroup | None) -> Callable[..., LanguageModelTrainer]:
    """The trainer of sharded parameters or of spans of sequences, of both or of neither.

    All processes share the parameters, those of one sequence among them: a shard is 1/processes of the model.
    """
    if group is None:
        return ShardedTrainer if fsdp else LanguageModelTrainer
    return partial(ShardedContextTrainer if fsdp else ContextTrainer, context_group=group)


class ShardedContextTrainer(ContextTrainer, ShardedTrainer):
    """Trains on spans of sequences under FSDP2."""


def _train_from(trainer: LanguageModelTrainer, start: Start) -> None:
    last = start.checkpoint
    if last is not None and start.step == start.config.optimizer.steps:
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
    # The Trainer turns the cache off for training; a program that loads the model will want to generate.
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
