"""``loglinear evaluate``: perplexity of a checkpoint, its loss by position, and measures of recall on the same text."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import tyro

from loglinear.tasks.lm.config import Data, DataConfig, Packing

if TYPE_CHECKING:
    import numpy as np
    import torch

    from loglinear.cli.checkpoint import Checkpoint
    from loglinear.tasks.lm.documents import Side, Source
    from loglinear.tasks.lm.tokens import Windows

Measure = Literal["repeats", "retrieval", "levels"]


@dataclass(frozen=True)
class EvaluateArgs:
    """Perplexity, loss by position and recall of a checkpoint, on its own validation data or on any other text."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of one of its checkpoints."""
    data: Data | None = None
    """As for train; none: the data of the run, as its record tells."""
    streaming: bool = False
    """As for train, of --data."""
    max_documents: int | None = None
    """As for train, of --data."""
    split: Literal["auto", "validation", "train", "all"] = "auto"
    """Documents to use; auto: the validation documents of the data that the model was trained on, all of other data."""
    suffixes: tuple[str, ...] | None = None
    """Which files of a folder are read; none: as in training."""
    text_field: str | None = None
    """Field of a JSON line or a dataset row that holds the text; none: as in training."""
    context: int | None = None
    """Tokens in a sequence; none: as in training."""
    packing: Packing | None = None
    """As for train; none: as in training."""
    sequences: int | None = None
    """At most this many sequences, evenly spread over the data."""
    batch_size: int = 8
    """Sequences per forward pass."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on a GPU that has it, float32 otherwise."""
    buckets: int = 32
    """Ranges of positions in the curve."""
    measures: tuple[Measure, ...] = ()
    """Further measures, each a .json with a .png and .svg. repeats: loss by distance where the last 4 tokens occurred before;
    retrieval: definitions (#define NAME value) asked for again; levels: mean λ of each level and layer."""
    distances: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    """Of retrieval: tokens between a definition and the question."""
    questions: int = 100
    """Of retrieval: definitions to ask for, at every distance."""
    output: Path | None = None
    """Folder for loss_by_position.json, .png and .svg; none: `evaluation` in the checkpoint's folder."""
    cache: Path = field(default_factory=lambda: DataConfig().cache)
    """Folder for tokenized data."""

    def __post_init__(self) -> None:
        if not self.distances or self.questions < 1:
            raise ValueError("distances and questions: retrieval needs at least one of each")
        for name, least in (("context", 2), ("sequences", 1), ("batch_size", 1), ("buckets", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}: got {value}")


def evaluate(args: EvaluateArgs) -> dict:
    """Write the curve and the numbers, print and return the summary."""
    import torch
    from rich.console import Console

    from loglinear.cli.checkpoint import open_checkpoint
    from loglinear.tasks.lm.atomic import write_atomically
    from loglinear.tasks.lm.evaluation import position_losses, summary
    from loglinear.tasks.lm.figure import draw_losses
    from loglinear.training.trainer import use_bfloat16

    console = Console(soft_wrap=True)
    checkpoint = open_checkpoint(args.checkpoint)
    windows, described = sequences(args, checkpoint)
    output = args.output or checkpoint.folder / "evaluation"
    output.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if use_bfloat16(args.precision) else torch.float32
    console.print(
        f"{described['side']} documents of {described['data']}: {len(windows):,} sequences of {windows.context:,}"
    )
    with console.status("evaluating") as status:
        losses = position_losses(
            checkpoint.model, windows, args.batch_size, dtype, lambda done: status.update(f"{done}/{len(windows)}")
        )
    result = {"checkpoint": str(checkpoint.folder), **described, **summary(losses, args.buckets)}
    before = output / "loss_by_position.json"
    if before.exists() and _text_of(json.loads(before.read_text(encoding="utf-8"))) != _text_of(result):
        for name in get_args(Measure):  # older measures may be of other text
            for suffix in ("json", "png", "svg"):
                (output / f"{name}.{suffix}").unlink(missing_ok=True)
    write_atomically(output / "loss_by_position.json", json.dumps(result, indent=2) + "\n")
    trained = (checkpoint.record or {}).get("arguments", {}).get("context")
    draw_losses({args.checkpoint.name: losses}, output / "loss_by_position.png", args.buckets, trained)
    console.print(
        f"loss {result['loss']:.4f} ± {result['standard_error']:.4f} nats per token, perplexity {result['perplexity']:.3f}"
    )
    console.print(f"curve and numbers: {output / 'loss_by_position.png'}, {output / 'loss_by_position.json'}")
    for measure in dict.fromkeys(args.measures):
        with console.status(measure):
            rows = _measure(measure, args, checkpoint, windows, losses, dtype, output)
        head = {"checkpoint": str(checkpoint.folder), "data": described["data"], "hash": described["hash"]}
        numbers = json.dumps({**head, "rows": rows}, indent=2) + "\n"
        write_atomically(output / f"{measure}.json", numbers)
        console.print(f"{measure}: {output / f'{measure}.png'}, {output / f'{measure}.json'}")
    return result


def _text_of(result: dict) -> list:
    """The text and the sequences of an evaluation, for its report."""
    return [result.get(name) for name in ("hash", "side", "context", "packing", "sequences")]


def _measure(
    measure: Measure,
    args: EvaluateArgs,
    checkpoint: Checkpoint,
    windows: Windows,
    losses: np.ndarray,
    dtype: torch.dtype,
    output: Path,
) -> list[dict]:
    """Draw one of the further measures and return its rows."""
    name, path = args.checkpoint.name, output / f"{measure}.png"
    if measure == "repeats":
        import numpy as np

        from loglinear.tasks.lm.repeats import by_distance, draw_repeats

        rows = by_distance(np.stack([windows[i]["input_ids"].numpy() for i in range(len(windows))]), losses)
        draw_repeats({name: rows}, path)
    elif measure == "levels":
        from loglinear.tasks.lm.levels import draw_levels, mean_level_scales

        rows = mean_level_scales(checkpoint.model, windows, args.batch_size, dtype)
        draw_levels(rows, path)
    else:
        from loglinear.tasks.lm.retrieval import draw_retrieval, questions, retrieve

        source, side = _source(args, checkpoint.record)
        asked = questions(source.documents(side), checkpoint.tokenizer, args.distances, args.questions)
        rows = retrieve(checkpoint.model, asked, dtype)
        draw_retrieval({name: rows}, path)
    return rows


def sequences(args: EvaluateArgs, checkpoint: Checkpoint) -> tuple[Windows, dict]:
    """The sequences to evaluate on, and their source for the report."""
    from loglinear.tasks.lm.tokens import Windows, tokenize
    from loglinear.training.model import longest_context

    source, side = _source(args, checkpoint.record)
    trained = checkpoint.record["arguments"] if checkpoint.record else {}
    context = args.context or trained.get("context") or longest_context(checkpoint.model) or DataConfig.context
    packing = args.packing or trained.get("packing", DataConfig.packing)
    windows = Windows(tokenize(source, side, checkpoint.tokenizer, args.cache), context, packing)
    described = {"data": source.label, "hash": source.hash, "side": side, "context": context, "packing": packing}
    described |= windows.describe()
    if args.sequences is not None:
        windows.thin(args.sequences)
    return windows, described


def _source(args: EvaluateArgs, record: dict | None) -> tuple[Source, Side]:
    """The text to read and its side (training or validation). By default a model never reads its own training text."""
    from loglinear.cli.checkpoint import open_text

    trained = record["arguments"] if record else {}
    hashes = record["data"] if record else {}
    fraction = trained.get("validation_fraction", DataConfig.validation_fraction)
    source = open_text(args, trained, trained.get("validation_data") or trained.get("data"), fraction)
    if args.data is None and source.hash not in (hashes["hash"], hashes.get("validation_hash")):
        raise ValueError(
            f"data: {source.label!r} is no longer what the model was trained on; name the text to evaluate on"
        )
    if args.split != "auto":
        return source, args.split
    was_split = trained.get("validation_data") is None and source.validation_fraction > 0
    return source, "validation" if was_split and source.hash == hashes.get("hash") else "all"
