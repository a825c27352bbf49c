"""``loglinear demo``: the effect of log-linear attention on one machine without a GPU, in a few minutes.

Two language models that differ in one word, the mixer, read the same sequences of Python source in the same order. The
demo reports the losses of both, whichever model is better.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from loglinear.tasks.lm.config import Data

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from torch import Tensor

    from loglinear.cli.checkpoint import Checkpoint
    from loglinear.training.config import Mixer, TrainConfig

PROMPT_TOKENS = 160
MIXERS: dict[str, Mixer] = {"Log-Linear Mamba-2": "log_linear_mamba2", "Mamba-2 (linear)": "mamba2"}


@dataclass(frozen=True)
class DemoArgs:
    """Train Log-Linear Mamba-2 and its linear twin on this Python's sources, and compare them."""

    output: Path = Path("out/demo")
    """Folder for both runs, the tokenized data, the figure and the numbers."""
    data: Data = "stdlib"
    """As for train."""
    steps: int = 400
    """Optimizer steps of each model."""
    batch_size: int = 2
    """Sequences per step."""
    context: int = 1024
    """Tokens in a sequence."""
    hidden_size: int = 128
    """Width of both models."""
    vocab_size: int = 4096
    """Entries of the tokenizer."""
    max_new_tokens: int = 120
    """Length of the continuation that the log-linear model writes."""
    learning_rate: float = 6e-3
    """Peak learning rate; the best of 0.003, 0.006 and 0.01 for both models at these sizes."""
    seed: int = 0
    """Of both models: the order of the data is the same."""


def demo(args: DemoArgs) -> dict:
    """Train both models, print the table, write figure and numbers, continue a piece of code; returns the numbers.

    Interrupted and started again, it goes on; complete, it only evaluates again.
    """
    from rich.console import Console

    from loglinear.cli.checkpoint import open_checkpoint
    from loglinear.cli.evaluate import EvaluateArgs, sequences
    from loglinear.tasks.lm.atomic import write_atomically
    from loglinear.tasks.lm.evaluation import position_losses
    from loglinear.tasks.lm.figure import draw_losses
    from loglinear.training.run import train

    console = Console(soft_wrap=True)
    losses, checkpoints = {}, {}
    for name, mixer in MIXERS.items():
        console.rule(f"training {name}")
        config = run_config(args, mixer)
        train(config, console)
        checkpoint = open_checkpoint(config.output)
        windows, _ = sequences(EvaluateArgs(config.output, cache=config.data.cache), checkpoint)
        losses[name] = position_losses(checkpoint.model, windows, args.batch_size)
        checkpoints[name] = checkpoint

    console.rule("validation")
    numbers = compare(losses)
    write_atomically(args.output / "comparison.json", json.dumps(numbers, indent=2) + "\n")
    draw_losses(losses, args.output / "loss_by_position.png")
    _print_table(numbers, checkpoints, console)
    console.rule("a continuation of validation code by the log-linear model")
    start = windows[0]["input_ids"][:PROMPT_TOKENS]
    _print_continuation(checkpoints["Log-Linear Mamba-2"], start, args, console)
    console.rule("where everything lies")
    _print_places(args.output, console)
    return numbers


def run_config(args: DemoArgs, mixer: Mixer) -> TrainConfig:
    """The run of one of the twins."""
    from loglinear.tasks.lm.config import DataConfig
    from loglinear.training.config import ModelConfig, OptimizerConfig, TrainConfig

    log_every = min(20, args.steps)
    return TrainConfig(
        output=args.output / mixer,
        data=DataConfig(args.data, vocab_size=args.vocab_size, context=args.context, cache=args.output / "cache"),
        model=ModelConfig(mixer=(mixer,), hidden_size=args.hidden_size, num_hidden_layers=2),
        optimizer=OptimizerConfig(steps=args.steps, batch_size=args.batch_size, learning_rate=args.learning_rate),
        seed=args.seed,
        log_every=log_every,
        save_every=5 * log_every,
        evaluate_every=args.steps,
    )


def compare(losses: dict[str, np.ndarray]) -> dict:
    """Summary of each model, and the difference of the first to the second, sequence by sequence."""
    from loglinear.tasks.lm.evaluation import Mean, summary

    first, second = losses
    difference = Mean.over_sequences(losses[first] - losses[second])
    return {
        "models": {name: summary(values) for name, values in losses.items()},
        "difference": {
            "of": f"{first} minus {second}, nats per token",
            "value": difference.value,
            "standard_error": difference.standard_error,
        },
    }


def verdict(difference: float, standard_error: float) -> str:
    """The conclusion from the numbers: a difference within two standard errors counts as none."""
    size = f"{abs(difference):.4f} ± {standard_error:.4f} nats per token"
    if abs(difference) <= 2 * standard_error:
        return f"The difference, {size}, is within two standard errors: no winner at this size."
    winner, loser = list(MIXERS) if difference < 0 else reversed(MIXERS)
    return f"{winner} is better than {loser} by {size} on the validation text, one run each."


def _print_table(numbers: dict, checkpoints: dict[str, Checkpoint], console: Console) -> None:
    from rich.table import Table

    table = Table("model", "perplexity", "loss in nats", "parameters", "tokens/s")
    for name, result in numbers["models"].items():
        loss = f"{result['loss']:.4f} ± {result['standard_error']:.4f}"
        record = checkpoints[name].record or {}
        speed = median(log["tokens_per_second"] for log in record["history"] if "loss" in log)
        parameters = f"{record['model']['parameters']:,}"
        table.add_row(name, f"{result['perplexity']:.3f}", loss, parameters, f"{speed:,.0f}")
    console.print(table)
    console.print(verdict(numbers["difference"]["value"], numbers["difference"]["standard_error"]))


def _print_continuation(checkpoint: Checkpoint, start: Tensor, args: DemoArgs, console: Console) -> None:
    from loglinear.cli.generate import GenerateArgs, continue_text

    prompt = str(checkpoint.tokenizer.decode(start))
    request = GenerateArgs(checkpoint.folder, prompt, max_new_tokens=args.max_new_tokens, seed=args.seed)
    continuation, state = continue_text(checkpoint, prompt, request, stream=False)
    console.print(prompt, style="dim", markup=False, highlight=False, end="")
    console.print(continuation, style="bold", markup=False, highlight=False)
    console.print(f"(dim: the prompt, bold: the model. {state})")


def _print_places(output: Path, console: Console) -> None:
    console.print(f"loss by position      {output / 'loss_by_position.png'}")
    console.print(f"the numbers           {output / 'comparison.json'}")
    for name, mixer in MIXERS.items():
        console.print(f"{name:<21} {output / mixer}")
    console.print(f"write more            loglinear generate {output / MIXERS['Log-Linear Mamba-2']} --prompt 'def '")
