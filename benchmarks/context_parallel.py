"""Checks context parallelism on several GPUs, then times one long sequence on all of them against one GPU.

    torchrun --standalone --nproc-per-node 2 benchmarks/context_parallel.py              # 262,144 tokens, the 825M model
    torchrun --standalone --nproc-per-node 2 benchmarks/context_parallel.py --layers 8 --mixer log_linear_gated_deltanet
    torchrun --standalone --nproc-per-node 2 benchmarks/context_parallel.py --device cpu --T 256 --layers 2 --hidden-size 64 \\
        --vocab-size 64 --steps 2 --results out/rows                                    # a rehearsal

The checks compare outputs and all gradients of the ops, with either gate, float32 and bfloat16, with the op on one GPU in
float64 (plain PyTorch), at decays that let a rank's past last. An error may be twice that of the kernels on one GPU, or the
limit of `benchmarks/verify.py` where that is more. The loss of the first training step must be that of one GPU within 1e-3.

Only then are rows written: the ops, forward and backward, what the ranks exchange in them, alone, and a training step
(autocast, checkpointed activations, clipping, AdamW; DistributedDataParallel on several). A time is that of the slowest
process, the median over --steps, its spread the 20th and 80th percentile; `speedup` is against one GPU with the same tokens.
While one GPU works the others wait.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from loglinear import log_linear_attention, log_linear_delta_rule
from loglinear.distributed import context, context_parallel_attention, context_parallel_delta_rule, context_span
from loglinear.layers import set_context_group
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.training.model import compile_blocks
from measure import RESULTS, append, environment
from ops_cpu import machine
from peers import Shape, channel_delta_inputs, channel_inputs, delta_inputs, inputs
from training_models import update
from verify import LIMITS, relative

OPS = {
    "scalar gate": (log_linear_attention, context_parallel_attention, inputs),
    "delta rule": (log_linear_delta_rule, context_parallel_delta_rule, delta_inputs),
    "gate per channel": (log_linear_attention, context_parallel_attention, channel_inputs),
    "delta rule, gate per channel": (log_linear_delta_rule, context_parallel_delta_rule, channel_delta_inputs),
}
SHAPES = dict.fromkeys(OPS, (16, 16, 128, 128)) | {
    "scalar gate": (48, 1, 128, 64)
}  # H, G, K, V, as in the other benchmarks
WARMUP = 2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--T", type=int, default=262_144, help="tokens of the sequence")
    parser.add_argument("--mixer", default="log_linear_mamba2", help="of the model; 'none' times no training step")
    parser.add_argument("--layers", type=int, default=21)
    parser.add_argument("--hidden-size", type=int, default=1536)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--ops", nargs="*", choices=tuple(OPS), default=list(OPS), help="timed alone")
    parser.add_argument("--steps", type=int, default=5, help="timed")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of the model")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--commit", help="hash to record where the checkout has no .git")
    return parser.parse_args()


def op_results(op: Callable, x: dict[str, Tensor], cotangent: Tensor, **options) -> list[Tensor]:
    """o and the gradients of all inputs."""
    x = {name: value.detach().requires_grad_() for name, value in x.items()}
    o = op(**x, **options)
    o = o[0] if isinstance(o, tuple) else o
    return [o.detach(), *torch.autograd.grad(o, list(x.values()), cotangent.to(o.dtype))]


def check_ops(device: str) -> None:
    """Both ops on every rank's span; exits where an error is too large."""
    group = dist.group.WORLD
    shape = (4, 2, 64, 64) if device == "cuda" else (2, 1, 8, 8)
    # Spans that are one block, and spans of three chunks, which are not.
    for length in ((1024 if device == "cuda" else 128) * group.size(), 192 * group.size()):
        for dtype, limit in LIMITS.items():
            for name, (op, over_ranks, make) in OPS.items():
                x = make(Shape(1, length, *shape, dtype), device, 1)
                x |= {weak: x[weak] / 50 for weak in ("g", "beta") if weak in x}
                cotangent = torch.randn(x["v"].shape, generator=torch.Generator(device).manual_seed(2), device=device)
                own = context_span(length, group)
                exact = op_results(op, {key: value.double() for key, value in x.items()}, cotangent)
                single = op_results(op, x, cotangent)
                found = op_results(over_ranks, {k: v[:, own] for k, v in x.items()}, cotangent[:, own], group=group)
                errors = torch.tensor([relative(a, b[:, own]) for a, b in zip(found, exact)], device=device)
                allowed = torch.tensor([max(limit, 2 * relative(a[:, own], b[:, own])) for a, b in zip(single, exact)])
                worst = errors / allowed.to(device)
                for tensor in (errors, worst):
                    dist.all_reduce(tensor, dist.ReduceOp.MAX)
                line = f"{name}, {dtype}, {length} tokens: errors {' '.join(f'{e:.1e}' for e in errors.tolist())}"
                if not worst.max() <= 1:
                    raise SystemExit(f"wrong results, nothing timed: {line}; of what is allowed {worst.tolist()}")
                say(f"correct: {line}")


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def step_times(call: Callable[[], object], steps: int, device: str, alone: bool) -> list[float]:
    """Milliseconds of each of ``steps`` calls, of the slowest process; ``alone``: rank 0 makes them, the others wait."""
    times = torch.zeros(steps, device=device)
    for step in range(WARMUP + steps):
        if not alone:
            dist.barrier()
        elif dist.get_rank():
            continue
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        if step >= WARMUP:
            times[step - WARMUP] = 1e3 * (time.perf_counter() - begin)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.tolist()


def time_op(name: str, args: argparse.Namespace) -> dict[int, dict]:
    """Forward and backward of the op in bfloat16, on one GPU and on all."""
    op, over_ranks, make = OPS[name]
    group, found = dist.group.WORLD, {}
    sizes = SHAPES[name] if args.device == "cuda" else (2, 1, 8, 8)
    shape = Shape(1, args.T, *sizes)
    for alone in (True, False):
        x = make(shape, args.device)
        own = slice(None) if alone else context_span(args.T, group)
        x = {key: value[:, own].clone() for key, value in x.items()}
        cotangent = torch.randn_like(x["v"])
        options = {} if alone else {"group": group}
        call = partial(op_results, op if alone else over_ranks, x, cotangent, **options)
        found[1 if alone else group.size()] = summary(step_times(call, args.steps, args.device, alone), args.device)
        del x, cotangent, call
    return found


def time_exchange(name: str, args: argparse.Namespace) -> dict:
    """The op's exchange alone: the all-gather of the forward pass and the all-to-all of the backward pass."""
    _, over_ranks, make = OPS[name]
    group, given, exchange = dist.group.WORLD, [], context.exchange

    def kept(through: Tensor, sent: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        given.append(sent.detach().requires_grad_())
        return exchange(through, sent, group)

    sizes = SHAPES[name] if args.device == "cuda" else (2, 1, 8, 8)
    context.exchange = kept
    with torch.no_grad():  # of one chunk a rank: the size does not depend on the length where a span is one block
        x = make(Shape(1, 64 * group.size(), *sizes), args.device)
        over_ranks(**{key: value[:, context_span(64 * group.size(), group)] for key, value in x.items()}, group=group)
    context.exchange = exchange
    (sent,) = given
    through = torch.zeros((), device=args.device, requires_grad=True)

    def call() -> None:
        out, received = exchange(through, sent, group)
        torch.autograd.grad((out, received), (sent,), (out, received))

    bytes_sent = 2 * (group.size() - 1) * sent.numel() * sent.element_size()  # by a rank, to all others, both ways
    return summary(step_times(call, args.steps, args.device, False), args.device) | {"bytes_sent": bytes_sent}


def summary(times: list[float], device: str) -> dict:
    """The median and its spread, and the largest memory of any process since it was last asked for."""
    low, *_, high = statistics.quantiles(times, n=5)
    peak = torch.zeros(1, device=device)
    if device == "cuda":
        peak += torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return {"ms": statistics.median(times), "ms_p20": low, "ms_p80": high, "peak_gib": round(peak.item(), 2)}


class Step:
    """A training step of the model on the whole sequence (``alone``) or on this rank's span."""

    def __init__(self, args: argparse.Namespace, alone: bool) -> None:
        self.device, self.world = args.device, 1 if alone else dist.get_world_size()
        torch.manual_seed(0)
        with torch.device(args.device):
            self.model = LogLinearForCausalLM(model_config(args)).train()
        self.model.gradient_checkpointing_enable()
        ids = torch.randint(args.vocab_size, (1, args.T), generator=torch.Generator().manual_seed(1))
        targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        own = slice(None) if alone else context_span(args.T, dist.group.WORLD)
        self.ids, self.targets = (x[:, own].contiguous().to(args.device) for x in (ids, targets))
        # DistributedDataParallel takes the mean of the gradients: of sums over count / world, that of all over count.
        self.count = (args.T - 1) / self.world
        if not alone:
            set_context_group(self.model, dist.group.WORLD)
        if args.compile:
            compile_blocks(self.model, fullgraph=alone)
        self.call = self.model if alone else DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=args.device == "cuda")
        self.losses: list[Tensor] = []

    def __call__(self) -> None:
        with torch.autocast(self.device, torch.bfloat16):
            targets = {"labels": self.targets, "shift_labels": self.targets, "num_items_in_batch": self.count}
            loss = self.call(input_ids=self.ids, **targets, skip_logits=True).loss
        loss.backward()
        update(self.model, self.optimizer)
        self.losses.append(loss.detach())


def model_config(args: argparse.Namespace) -> LogLinearConfig:
    return LogLinearConfig(
        mixer=args.mixer,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        vocab_size=args.vocab_size,
        max_position_embeddings=args.T,
    )


def time_steps(args: argparse.Namespace) -> dict[int, dict]:
    """Training steps on one GPU and on all; exits if their losses differ."""
    found, first = {}, []
    for alone in (True, False):
        step = Step(args, alone) if not alone or dist.get_rank() == 0 else lambda: None
        times = step_times(step, args.steps, args.device, alone)
        loss = step.losses[0].float().clone() if isinstance(step, Step) else torch.zeros((), device=args.device)
        dist.all_reduce(loss)
        del step
        world = 1 if alone else dist.get_world_size()
        first.append(loss.item() / world)
        found[world] = summary(times, args.device) | {"first_loss": first[-1]}
    if not abs(first[1] - first[0]) <= 1e-3 * first[0]:
        raise SystemExit(
            f"the first loss is {first[1]} and on one GPU {first[0]}: nothing recorded of the training step"
        )
    return found


def keep(op: str, found: dict[int, dict], common: dict, args: argparse.Namespace) -> None:
    """Write and print the rows of one GPU and of all."""
    rows = []
    for gpus, row in found.items():
        row = {"op": op, "gpus": gpus, "T": args.T, **row, "speedup": round(found[1]["ms"] / row["ms"], 3)}
        rows.append(common | row)
        say(f"{op}, {gpus} GPU(s): {row['ms']:.1f} ms ({row['ms_p20']:.1f} … {row['ms_p80']:.1f}), "
            f"{row['speedup']:.2f} x one, {row['peak_gib']} GiB")  # fmt: skip
    if dist.get_rank() == 0:
        append("context_parallel", rows, args.results)


def main() -> None:
    args = arguments()
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    if dist.get_world_size() < 2:
        raise SystemExit("nproc-per-node must be at least 2: got one process")
    check_ops(args.device)
    common = environment() if args.device == "cuda" else machine(torch.get_num_threads())
    common = {**common, "commit": args.commit or common["commit"], "steps": args.steps}
    for name in args.ops:
        H, G, K, V = SHAPES[name]
        sizes = common | {"H": H, "G": G, "K": K, "V": V, "dtype": "bfloat16"}
        keep(name, time_op(name, args), sizes, args)
        row = time_exchange(name, args) | {"op": f"{name}: exchange alone", "gpus": dist.get_world_size(), "T": args.T}
        say(f"{row['op']}: {row['ms']:.2f} ms for {row['bytes_sent'] / 1e6:.1f} MB sent by a rank")
        if dist.get_rank() == 0:
            append("context_parallel", [sizes | row], args.results)
    if args.mixer != "none":
        sizes = {key: getattr(args, key) for key in ("mixer", "layers", "hidden_size", "vocab_size", "compile")}
        sizes |= {"dtype": "bfloat16 autocast", "checkpointing": True}
        keep("training step", time_steps(args), common | sizes, args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
