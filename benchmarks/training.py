"""Times whole training steps of the paper's models and of their peers, with the milliseconds of each part.

    python benchmarks/training.py                              # all models at 16K and 64K, the log-linear ones at 2K to 131K
    python benchmarks/training.py --models log_linear_mamba2 "transformer, flash attention 2" --lengths 16384
    python benchmarks/training.py --tokens 131072 --checkpointing always --lengths 16384 131072 --models log_linear_mamba2
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python benchmarks/training.py --longest    # that trains: 256K, 512K, 1M

A step is a step of `loglinear train --compile`: float32 weights, bfloat16 autocast, compiled blocks, the norm of the gradient
clipped, fused AdamW; `--tokens` a step, or one row where the context is longer. Blocks are compiled again for every length, and
activations are checkpointed where they do not fit otherwise (a column says so). A time is the median over the steps, its spread
the 20th and 80th percentile; parts come from one more step under the profiler (`training_parts.py` says how they are told
apart), and peak memory from the timed steps. Model FLOPs: `training_models.py`.

`python experiments/training_page.py` makes a page and a figure of the rows.

First of all two layers of each model, eager, are checked: gradients against the same weights in float64 and plain PyTorch.
A failure, for want of memory or of a package, is a line without a row. The next model or length then goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import os
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent))
import training_peers
from loglinear.models import LogLinearForCausalLM
from loglinear.training.model import compile_blocks
from loglinear.training.trainer import decay_parameter_names
from measure import RESULTS, append, environment
from ops_cpu import machine
from training_models import COLUMNS, Column, Size, build, checkpoint_activations, model_flops, update
from training_parts import Weights, milliseconds_by_part, profile

NAME = "training"
LENGTHS = [1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16, 1 << 17]
COMPARED = [1 << 14, 1 << 16]  # where all columns are timed
LONGEST = [1 << 18, 1 << 19, 1 << 20]
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # bf16 on tensor cores without sparsity, NVIDIA's data sheets (SXM)
# Relative error of one parameter's gradient, two layers. Measured on two CPU cores, all mixers: 1.1% to 4% at widths of 96 and
# 768, up to 18% at width 64, where a vector has the numbers of two heads. Gates too large by half: 30% to 120%.
LIMIT = 0.25


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=tuple(COLUMNS), help="default: all; --longest: log_linear_mamba2"
    )
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of a row; default: see above")
    parser.add_argument("--tokens", type=int, default=1 << 15, help="of a step, in as many rows as it takes")
    for field in dataclasses.fields(Size)[:-1]:
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--checkpointing", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--offload", action="store_true", help="keep the checkpoints in the host's memory")
    parser.add_argument("--residual", choices=("float32", "bfloat16"), default="float32", help="dtype of the stream")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--dynamic", action="store_true", help="compile once for all lengths")
    parser.add_argument("--steps", type=int, default=8, help="timed; fewer, but two, where they take over --seconds")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument(
        "--longest", action="store_true", help="one step of 256K, 512K and 1M tokens each, checkpointed"
    )
    parser.add_argument("--old-fla", help="folder with flash-linear-attention 0.2.2, unpacked")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--commit", help="hash to record where the checkout has no .git")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1: got {args.steps}")
    if args.longest:
        args.models, args.lengths = args.models or ["log_linear_mamba2"], args.lengths or LONGEST
        args.checkpointing, args.steps = "always", 1
    if args.old_fla:
        training_peers.use_fla(args.old_fla)
    return args


def lengths_of(name: str, args: argparse.Namespace) -> list[int]:
    """Lengths to time a column at."""
    ours = COLUMNS[name].mixer.startswith("log_linear_")
    return args.lengths or (LENGTHS if ours else COMPARED)


class Trainer:
    """A model, its optimiser and a step, as ``loglinear train`` sets them up."""

    def __init__(self, model: LogLinearForCausalLM, column: Column, args: argparse.Namespace) -> None:
        self.model, self.column, self.offload = model, column, args.offload
        self.cuda = model.device.type == "cuda"
        decayed = set(decay_parameter_names(model))
        groups: tuple[list, list] = ([], [])
        for name, parameter in model.named_parameters():
            groups[name not in decayed].append(parameter)
        options = {"lr": 1e-4, "betas": (0.9, 0.95), "fused": self.cuda}
        self.optimizer = torch.optim.AdamW(
            [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}], **options
        )

    def loss(self, ids: Tensor) -> Tensor:
        """The loss of ``ids`` under autocast, on the kernels of the column."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(self.model.device.type, torch.bfloat16))
            if self.column.backend is not None:
                stack.enter_context(sdpa_kernel(self.column.backend))
            if self.offload:
                stack.enter_context(torch.autograd.graph.save_on_cpu(pin_memory=self.cuda))
            return self.model(input_ids=ids, labels=ids).loss

    def step(self, ids: Tensor) -> Tensor:
        """One step; the loss before it."""
        loss = self.loss(ids)
        loss.backward()
        update(self.model, self.optimizer)
        return loss.detach()

    def times(self, ids: Tensor, steps: int) -> list[float]:
        """Milliseconds of each of ``steps`` steps; the host runs ahead as far as it can."""
        marks: list = []
        for i in range(steps + 1):
            if self.cuda:
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
            else:
                marks.append(time.perf_counter())
            if i < steps:
                self.step(ids)
        if self.cuda:
            torch.cuda.synchronize()
            return [one.elapsed_time(other) for one, other in pairwise(marks)]
        return [1e3 * (other - one) for one, other in pairwise(marks)]

    def release(self) -> None:
        """Drop what a failed or finished measurement leaves behind."""
        self.optimizer.zero_grad()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def check(name: str, args: argparse.Namespace, length: int = 320) -> float:
    """Largest relative error of a parameter's gradient, two layers under autocast against float64; raises if it is no rounding.

    Weights are larger than a model's at its start, so that what is remembered counts beside the skip, and norms do not blow up
    the first outputs, which are nearly 0 and all rounding (with an eps of 1e-6 Gated DeltaNet is 5% to 110% off).
    """
    column = COLUMNS[name]
    size = Size(args.hidden_size, 2, 2, args.vocab_size, length)
    options = {"initializer_range": args.hidden_size**-0.5, "rms_norm_eps": 0.1}
    config = size.config(column.mixer, layers=2, residual_in_fp32=args.residual == "float32", **options)
    model, exact = build(config, column, args.device), build(config, Column(column.mixer), args.device)
    exact.load_state_dict(model.state_dict())
    exact.double()
    ids = torch.randint(args.vocab_size, (2, length), device=args.device)
    Trainer(model, column, args).loss(ids).backward()
    exact(input_ids=ids, labels=ids).loss.backward()
    wanted = dict(exact.named_parameters())
    errors = {}
    for parameter, value in model.named_parameters():
        want = wanted[parameter].grad
        errors[parameter] = ((value.grad - want).norm() / want.norm()).item()
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] < LIMIT:
        raise ArithmeticError(f"the gradient of {worst} is wrong: relative error {errors[worst]:.1e} against float64")
    return errors[worst]


def measure(trainer: Trainer, length: int, checkpointing: bool, args: argparse.Namespace) -> dict:
    """Columns of one row. Raises whatever the step raises."""
    model, batch = trainer.model, max(1, args.tokens // length)
    checkpoint_activations(model, checkpointing)
    ids = torch.randint(model.config.vocab_size, (batch, length), device=model.device)
    first = trainer.step(ids).item()  # compiles
    if trainer.cuda:
        torch.cuda.reset_peak_memory_stats()
    alone = trainer.times(ids, 1)
    steps = min(args.steps, max(2, int(1e3 * args.seconds / alone[0]))) if args.steps > 1 else 0
    times = trainer.times(ids, steps) if steps else alone
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
    median, flops = statistics.median(times), model_flops(model, batch, length)
    peak = next(
        (peak for gpu, peak in PEAK_FLOPS.items() if trainer.cuda and gpu in torch.cuda.get_device_name()), None
    )
    row = {"B": batch, "T": length, "checkpointing": checkpointing, "steps": len(times), "first_loss": first}
    row |= {"ms": median, "ms_low": low, "ms_high": high, "tokens_per_s": 1e3 * batch * length / median}
    row |= {"peak_bytes": torch.cuda.max_memory_allocated() if trainer.cuda else None}
    row |= {"model_flops": flops, "peak_flops": peak, "flop_share": peak and 1e3 * flops / median / peak}
    if trainer.cuda and not args.longest:
        parts = milliseconds_by_part(profile(lambda: trainer.step(ids)), Weights.of(model))
        row["products_ms"] = parts.pop("products")
        row["parts_ms"] = parts
        row["outside_share"] = 1 - (row["products_ms"] + parts["op"]) / median
    return row


def attempt(trainer: Trainer, length: int, args: argparse.Namespace) -> dict:
    """``measure``, under "auto" a second time with activation checkpointing where memory did not suffice; or {"error"}."""
    row: dict = {}
    for checkpointing in {"auto": (False, True), "always": (True,), "never": (False,)}[args.checkpointing]:
        try:
            return measure(trainer, length, checkpointing, args)
        except torch.OutOfMemoryError as error:
            row = {"error": f"{type(error).__name__}: {error}"[:200]}
        except Exception as error:  # whatever a peer raises, the others are still to be timed
            return {"error": f"{type(error).__name__}: {error}"[:200]}
        finally:
            trainer.release()
    return row


def show(name: str, length: int, row: dict) -> None:
    if "error" in row:
        print(f"{name:30s} {length:8d}  not timed: {row['error']}", flush=True)
        return
    share = "" if row["flop_share"] is None else f"  {row['flop_share']:6.1%} of peak"
    memory = "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 2**30:6.1f} GiB"
    how = "  checkpointed" if row["checkpointing"] else ""
    spread = f"({row['ms_low']:.1f} … {row['ms_high']:.1f})"
    print(
        f"{name:30s} {length:8d}  {row['tokens_per_s']:10.0f} tokens/s  {row['ms']:9.1f} ms {spread}{share}{memory}{how}"
    )
    if "parts_ms" in row:
        parts = "  ".join(f"{part} {ms:.1f}" for part, ms in row["parts_ms"].items())
        idle = row["ms"] - sum(row["parts_ms"].values())
        print(f"    {parts}  idle {idle:.1f};  outside products and op {row['outside_share']:.1%}", flush=True)


def time_column(name: str, common: dict, args: argparse.Namespace) -> None:
    """Append the rows of one model as they come."""
    column = COLUMNS[name]
    try:
        error = check(name, args)
    except Exception as reason:  # a peer that is not installed or not right is no reason to leave out the others
        print(f"{name:30s}  nothing timed: {type(reason).__name__}: {reason}", flush=True)
        return
    size = Size(args.hidden_size, args.layers, args.attention_layers, args.vocab_size, common["context"])
    model = build(size.config(column.mixer), column, args.device)
    model.config.residual_in_fp32 = args.residual == "float32"
    trainer = Trainer(model, column, args)
    about = {"model": name, "layers": model.config.num_hidden_layers, "error_against_float64": error}
    about |= {"parameters": model.num_parameters()}
    for i, length in enumerate(lengths_of(name, args)):
        if not args.eager and (i == 0 or not args.dynamic):
            torch._dynamo.reset()
            if i == 0:
                compile_blocks(model, dynamic=args.dynamic)
        row = attempt(trainer, length, args)
        show(name, length, row)
        if "error" not in row:
            append(NAME, [{**common, **about, **row}], args.results)


def run(args: argparse.Namespace) -> None:
    """Time every column."""
    names = args.models or list(COLUMNS)
    common = machine(torch.get_num_threads()) if args.device == "cpu" else environment()
    common["commit"] = args.commit or common["commit"]
    common |= {"op": "training step", "longest": args.longest, "hidden_size": args.hidden_size}
    common |= {"vocab_size": args.vocab_size, "tokens": args.tokens, "residual": args.residual, "offload": args.offload}
    common |= {"compiled": "no" if args.eager else "for all lengths" if args.dynamic else "for the length"}
    common["allocator"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    common["context"] = max(length for name in names for length in lengths_of(name, args))
    for name in names:
        time_column(name, common, args)
        gc.collect()
        if args.device != "cpu":
            torch.cuda.empty_cache()


def main() -> None:
    run(arguments())


if __name__ == "__main__":
    main()
