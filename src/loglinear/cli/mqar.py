"""``loglinear mqar``: how many key-value pairs each kind of model recalls, as a table, a figure and rows."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loglinear.tasks.mqar.config import MODELS, PRESETS, Grid

if TYPE_CHECKING:
    from rich.table import Table

    from loglinear.tasks.mqar.report import Result

# docs/results.md has this finding at sizes that the small preset does not reach.
FULL_GRID = (
    "A setting of one layer and 64 tokens, chosen because the log-linear model seemed to gain most there. On the full grid "
    "(docs/results.md) log-linear models are ahead of their linear twins at some sizes, level or behind at others, and behind "
    "linear models with as large a state at every size tried."
)


@dataclass(frozen=True)
class MqarArgs:
    """Multi-query associative recall: train small models side by side and compare how many pairs they recall.

    The preset decides every option that is left at none. An interrupted run goes on when it is started again.
    """

    preset: Literal["small", "full"] = "small"
    """small: Mamba-2, its log-linear twin and Mamba-2 with as large a state, ten seeds each, on two CPU cores in minutes; full:
    five models at six sizes on one GPU."""
    output: Path = Path("out/mqar")
    """Folder for rows.jsonl, results.json, accuracy.png and .svg; models whose rows are there are not trained again."""
    workers: int | None = None
    """Processes that train models; none: one for each core, or two for each GPU."""
    at_once: int | None = None
    """Models that take turns in one process, on a GPU each on a stream of its own; none: 8 on a GPU, otherwise 1."""
    device: str | None = None
    """cuda or cpu; none: cuda if there is one."""
    models: tuple[str, ...] | None = None
    """Names as in the table."""
    widths: tuple[int, ...] | None = None
    """Widths of the models."""
    lengths: tuple[int, ...] | None = None
    """Tokens in a sequence."""
    pairs: tuple[int, ...] | None = None
    """Numbers of key-value pairs for the first length, at most a quarter of it; more in proportion for the others."""
    state_size: int | None = None
    """Width of the keys of recurrent models."""
    matched_state: bool = False
    """Also linear models with one state as large as all states of their log-linear twin together; the small preset always has
    them."""
    learning_rates: tuple[float, ...] | None = None
    """Tried for every model alike with the first seed; the best on validation sequences gets all seeds."""
    seeds: tuple[int, ...] | None = None
    """Of weights and training sequences."""
    steps: int | None = None
    """Optimizer steps of each model."""
    batch_tokens: int | None = None
    """Tokens per step: with sequences of twice the length there are half as many."""
    vocab_size: int | None = None
    """Half of it keys, half of it values."""
    weight_decay: float | None = None
    """Of matrices."""
    equal_shares: bool | None = None
    """The same share of the loss for each number of pairs, instead of for each answer."""
    tied: bool | None = None
    """The output layer is the embedding."""
    output_scale: float | None = None
    """Of the initial output projections of all layers."""
    initial_decay: float | None = None
    """Factor on the initial decay rates of recurrent models."""
    precision: Literal["float32", "bfloat16"] | None = None
    """bfloat16: under autocast."""

    def __post_init__(self) -> None:
        self.grid()

    def grid(self) -> Grid:
        """The preset, with the given options in place of its own. Raises ValueError for options that cannot be run."""
        grid = PRESETS[self.preset]
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        given["matched_state"] = grid.matched_state or self.matched_state
        recipe = replace(grid.recipe, **{n: v for n, v in given.items() if n in {f.name for f in fields(grid.recipe)}})
        grid = replace(grid, recipe=recipe, **{n: v for n, v in given.items() if n in {f.name for f in fields(grid)}})
        for name in ("models", "widths", "lengths", "pairs", "learning_rates", "seeds"):
            if not getattr(grid, name):
                raise ValueError(f"{name} must not be empty")
        counts = {"workers": self.workers, "at_once": self.at_once, "state_size": grid.state_size}
        counts |= {"steps": recipe.steps, "batch_tokens": recipe.batch_tokens}
        counts |= {name: min(getattr(grid, name)) for name in ("widths", "lengths", "pairs")}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1: got {count}")
        unknown = [model for model in grid.models if model not in MODELS]
        if unknown:
            raise ValueError(f"models must be among {list(MODELS)}: got {unknown}")
        return grid


def mqar(args: MqarArgs) -> list[Result]:
    """Train the models that have no row yet, print the table and its verdicts, write figure and numbers.

    Returns the results.
    """
    import json
    from dataclasses import asdict

    import torch
    from rich.console import Console

    from loglinear.tasks.lm.atomic import write_atomically
    from loglinear.tasks.mqar.data import check_batches
    from loglinear.tasks.mqar.figure import draw_accuracy
    from loglinear.tasks.mqar.report import results, verdicts, widest_spread
    from loglinear.tasks.mqar.run import run_grid

    console = Console(soft_wrap=True)
    grid = args.grid()
    for cells in grid.sweeps():
        check_batches(cells[0].batch_size, cells[0].length, cells[0].pairs, grid.recipe.vocab_size)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu, cores = device == "cuda", os.cpu_count() or 1
    workers = args.workers or (2 * torch.cuda.device_count() if on_gpu else min(cores, 64))
    at_once = args.at_once or (8 if on_gpu else 1)

    def on_row(row: dict, done: int, total: int) -> None:
        cell, recalled = row["cell"], sum(row["test"].values()) / len(row["test"])
        console.print(
            f"{done}/{total}  {cell['model']}, width {cell['width']}, length {cell['length']}, K {cell['state_size']}, "
            f"learning rate {cell['learning_rate']:g}, seed {cell['seed']}: {recalled:.3f} in {row['seconds']:.0f} s",
            highlight=False,
        )

    found = results(run_grid(grid, args.output / "rows.jsonl", workers, device, on_row, at_once))
    for length in grid.lengths:
        console.print(accuracy_table([result for result in found if result.length == length]))
    lines = verdicts(found)
    caveats = [widest_spread(found), FULL_GRID if args.preset == "small" else None]
    lines += [caveat for caveat in caveats if caveat is not None]
    for line in lines:
        console.print(line, highlight=False)
    draw_accuracy(found, args.output / "accuracy.png")
    described = [asdict(result) | {"seeds": result.seeds, "accuracy": result.accuracy} for result in found]
    numbers = {"results": described, "verdicts": lines}
    write_atomically(args.output / "results.json", json.dumps(numbers, indent=2) + "\n")
    console.print(f"rows, numbers and figure: {args.output}")
    return found


def accuracy_table(found: list[Result]) -> Table:
    """Accuracy on the test sequences of one length, mean and standard deviation over seeds."""
    from rich.table import Table

    counts = [pairs for pairs in found[0].accuracy if pairs != "mean"]
    columns = [*counts, "mean"] if len(counts) > 1 else counts
    title = f"Share of values recalled, length {found[0].length}: mean ± standard deviation over seeds"
    headers = ("model", "width", "K", "state", "learning rate", "seeds")
    table = Table(*headers, *(c if c == "mean" else f"{c} pairs" for c in columns), title=title)
    for result in found:
        recurrent = result.state_floats is not None
        state = (str(result.state_size), f"{result.state_floats:,}") if recurrent else ("", "")
        values = [f"{mean:.3f} ± {spread:.3f}" for mean, spread in (result.accuracy[c] for c in columns)]
        table.add_row(result.model, str(result.width), *state, f"{result.learning_rate:g}", str(result.seeds), *values)
    return table
