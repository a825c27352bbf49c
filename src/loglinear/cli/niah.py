"""``loglinear niah``: needle in a haystack, as data, as a short fine-tune and as a test with its heatmap."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import tyro

from loglinear.tasks.niah.config import GridConfig, TaskConfig, TuneConfig
from loglinear.training.config import Contradiction, Precision

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerFast

    from loglinear.tasks.niah.data import Samples, Side


@dataclass(frozen=True)
class DataArgs:
    """Write the samples of a test as .jsonl: prompt, answer, and token ids."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of one of its checkpoints: its tokenizer, and its data if no other is given."""
    output: Path
    """The .jsonl to write."""
    task: TaskConfig = field(default_factory=TaskConfig)
    grid: GridConfig = field(default_factory=GridConfig)


@dataclass(frozen=True)
class FinetuneArgs:
    """Fine-tune a checkpoint on needles in the training documents."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of one of its checkpoints."""
    output: Path
    """Folder for the tuned model and its record."""
    task: TaskConfig = field(default_factory=TaskConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    precision: Precision = "auto"
    """auto: bfloat16 autocast on a GPU that has it, float32 otherwise."""


@dataclass(frozen=True)
class EvaluateArgs:
    """Test a checkpoint on needles in the validation documents: niah.json and the heatmap niah.png and .svg."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, of one of its checkpoints, or of a fine-tuned model."""
    output: Path | None = None
    """Folder for niah.json, niah.png and niah.svg; none: `evaluation` in the checkpoint's folder."""
    task: TaskConfig = field(default_factory=TaskConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    batch_tokens: int = 65536
    """Tokens of a forward pass."""
    precision: Precision = "auto"
    """auto: bfloat16 autocast on a GPU that has it, float32 otherwise."""


NiahArgs = Union[  # noqa: UP007 - annotated subcommands
    Annotated[DataArgs, tyro.conf.subcommand("data")],
    Annotated[FinetuneArgs, tyro.conf.subcommand("finetune")],
    Annotated[EvaluateArgs, tyro.conf.subcommand("evaluate")],
]


def niah(args: DataArgs | FinetuneArgs | EvaluateArgs) -> Any:
    """Run one of the three commands: data, finetune or evaluate."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    if isinstance(args, DataArgs):
        return write_data(args, console)
    if isinstance(args, FinetuneArgs):
        return finetune(args, console)
    return evaluate(args, console)


def write_data(args: DataArgs, console: Console) -> int:
    """Write the samples that ``evaluate`` would test; returns their number."""
    from loglinear.cli.checkpoint import open_checkpoint
    from loglinear.tasks.lm.atomic import naming
    from loglinear.tasks.niah.data import grid_samples

    checkpoint = open_checkpoint(args.checkpoint)
    samples, _ = open_samples(args.task, checkpoint.tokenizer, checkpoint.record, "test")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with naming(args.output), args.output.open("w", encoding="utf-8", newline="\n") as file:
        for sample in grid_samples(samples, args.grid):
            count += 1
            row = {
                "kind": sample.kind,
                "context": len(sample.ids),
                "depth": sample.depth,
                "key": sample.key,
                "values": sample.values,
                "prompt": checkpoint.tokenizer.decode(sample.ids[: sample.answer_start]),
                "answer": checkpoint.tokenizer.decode(sample.ids[sample.answer_start :]),
                "input_ids": sample.ids.tolist(),
                "answer_start": sample.answer_start,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    console.print(f"{count:,} samples: {args.output}")
    return count


def finetune(args: FinetuneArgs, console: Console) -> list[dict]:
    """Fine-tune and save. The record holds the run before and, under "niah", this fine-tune."""
    import torch
    from transformers import set_seed

    from loglinear.cli.checkpoint import open_checkpoint
    from loglinear.training.disk import writing_to
    from loglinear.training.finetune import finetune as run
    from loglinear.training.record import RECORD, versions, write_record
    from loglinear.training.trainer import use_bfloat16

    if (args.output / RECORD).exists():
        raise ValueError(f"output: {args.output} holds a run already; choose another folder")
    checkpoint = open_checkpoint(args.checkpoint)
    samples, described = open_samples(args.task, checkpoint.tokenizer, checkpoint.record, "train")
    args.output.mkdir(parents=True, exist_ok=True)
    set_seed(args.task.seed)
    dtype = torch.bfloat16 if use_bfloat16(args.precision) else torch.float32
    console.print(f"{checkpoint.model.num_parameters():,} parameters; needles in {described['data']}")
    log = run(
        checkpoint.model,
        samples,
        args.tune,
        dtype,
        lambda entry: console.print(
            f"step {entry['step']}/{args.tune.steps}  loss {entry['loss']:.4f}  exact {entry['exact']:.3f}  "
            f"{entry['tokens_per_second']:,.0f} tokens/s"
        ),
    )
    with writing_to(args.output):
        checkpoint.model.save_pretrained(args.output)
        checkpoint.tokenizer.save_pretrained(args.output)
    tuned = {
        "checkpoint": str(checkpoint.folder),
        **{"haystack": described, **_flat(args.task), **_flat(args.tune), "precision": str(dtype)},
        "versions": versions(),
        "history": log,
    }
    before = checkpoint.record or {}
    kept = {name: before.get(name, {}) for name in ("arguments", "data", "model")}  # its metrics are no longer true
    write_record(args.output, {"status": "complete", **kept, "niah": tuned})
    console.print(f"the model and {RECORD}: {args.output}")
    return log


def evaluate(args: EvaluateArgs, console: Console) -> dict:
    """Score the grid, write the numbers and the heatmap, print and return the summary."""
    import torch
    from rich.table import Table

    from loglinear.cli.checkpoint import open_checkpoint
    from loglinear.tasks.lm.atomic import write_atomically
    from loglinear.tasks.niah.data import grid_samples
    from loglinear.tasks.niah.evaluate import by_context, score_samples, table
    from loglinear.tasks.niah.figure import draw_heatmaps
    from loglinear.training.trainer import use_bfloat16

    checkpoint = open_checkpoint(args.checkpoint)
    samples, described = open_samples(args.task, checkpoint.tokenizer, checkpoint.record, "test")
    output = args.output or checkpoint.folder / "evaluation"
    output.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if use_bfloat16(args.precision) else torch.float32
    total = len(set(args.grid.contexts)) * len(set(args.task.kinds)) * args.grid.depths * args.grid.samples
    with console.status("evaluating") as status:
        scored = score_samples(
            checkpoint.model,
            grid_samples(samples, args.grid),
            args.batch_tokens,
            dtype,
            lambda done: status.update(f"{done}/{total}"),
        )
    rows = table(scored)
    tuned = (checkpoint.record or {}).get("niah")
    result = {
        "checkpoint": str(checkpoint.folder),
        "tuned_contexts": tuned and tuned["contexts"],
        **{"haystack": described, **_flat(args.task), **_flat(args.grid), "precision": str(dtype)},
        "scoring": "teacher-forced argmax over the tokens of the answer, which is what greedy decoding would write",
        "by_context": by_context(rows),
        "cells": rows,
    }
    write_atomically(output / "niah.json", json.dumps(result, indent=2) + "\n")
    draw_heatmaps({args.checkpoint.name: rows}, output / "niah.png", tuned and max(tuned["contexts"]))
    shown = Table("kind", "length", "samples", "exact")
    for row in result["by_context"]:
        exact = f"{row['exact']:.3f} ± {row['standard_error']:.3f}"
        shown.add_row(row["kind"], f"{row['context']:,}", str(row["samples"]), exact)
    console.print(shown)
    console.print(f"heatmap and numbers: {output / 'niah.png'}, {output / 'niah.json'}")
    return result


def open_samples(
    task: TaskConfig, tokenizer: PreTrainedTokenizerFast, record: dict | None, side: Side
) -> tuple[Samples, dict]:
    """Samples whose haystack is the training or the validation text, and the source of this text."""
    from loglinear.cli.checkpoint import open_text
    from loglinear.tasks.lm.config import DataConfig
    from loglinear.tasks.lm.tokens import tokenize
    from loglinear.tasks.niah.data import Haystack, Samples

    trained = (record or {}).get("arguments", {})
    other = None if task.data else trained.get("validation_data")
    fraction = trained.get("validation_fraction", DataConfig.validation_fraction)
    if task.data and not fraction:
        fraction = DataConfig.validation_fraction  # of other text
    if side == "test" and not other and not fraction:
        raise Contradiction("data: needed, because the run trained on all of its text: validation_fraction was 0")
    source = open_text(task, trained, other if other and side == "test" else trained.get("data"), fraction)
    hashes = (record or {}).get("data", {})
    if task.data is None and source.hash not in (hashes.get("hash"), hashes.get("validation_hash")):
        raise ValueError(
            f"data: {source.label!r} is no longer what the model was trained on; name the text of the haystack"
        )
    part: Any = "all" if other else {"train": "train", "test": "validation"}[side]
    tokens = tokenize(source, part, tokenizer, task.cache)
    described = {"data": source.label, "hash": source.hash, "side": part, "tokens": len(tokens.values)}
    return Samples(Haystack(tokens, tokenizer.eos_token_id), tokenizer, side, task), described


def _flat(config: Any) -> dict:
    """The fields of a dataclass, ready for JSON, without the folder of the cache."""
    fields = dataclasses.asdict(config)
    fields.pop("cache", None)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
