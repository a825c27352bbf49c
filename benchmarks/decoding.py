"""Times one decoding step of one layer's op, and its peers, in one process.

    python benchmarks/decoding.py                        # 48 heads of 128x64: B=64 and 16K, B=16 and 131K, B=1 to 1M
    python benchmarks/decoding.py --rule delta           # 16 heads of 128x128; channel, channel_delta: gates per key channel
    python benchmarks/decoding.py --B 64 --context 16384 --peers ""
    python benchmarks/decoding.py --rows shuffled        # rows of the state by index, in pages of an engine

Every row of the batch stands at a position of its own, drawn evenly from the last quarter of the context ("mixed"), or all at
the one before the context's end ("full": every bit of the chunk number is set, the most that a step can read). A step is
repeated at the same positions. Times are times of CUDA graph replays (flash-linear-attention's op cannot be captured) with a
cold L2 cache; ``floor_ms`` is the bytes that the step must read (live entries, open tokens) over the bandwidth of a copy in the
same process. A step that differs from the plain form ends the command. Rows are appended to benchmarks/results/decoding.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent))
from loglinear import DecodingState, log_linear_attention_step, log_linear_delta_rule_step
from loglinear.layers.pages import PageLayout
from loglinear.layers.state import RecurrentMixerState
from measure import append, captured, environment, milliseconds
from peers import (
    Shape,
    channel_delta_inputs,
    channel_inputs,
    delta_inputs,
    fla_log_linear_step,
    inputs,
    mamba2_step,
)


class Rule(NamedTuple):
    """One transition to time: its name in rows, the sizes of a step of one row, the inputs of a shape, and our step."""

    name: str
    shape: Shape
    inputs: Callable[[Shape], dict[str, Tensor]]
    step: Callable[..., Tensor]


SQUARE = Shape(1, 1, 16, 16, 128, 128)
GATE = partial(log_linear_attention_step, backend="triton")
DELTA = partial(log_linear_delta_rule_step, backend="triton")
RULES = {
    "scalar": Rule("scalar gate", Shape(1, 1, 48, 1, 128, 64), inputs, GATE),
    "delta": Rule("delta rule", SQUARE, delta_inputs, DELTA),
    "channel": Rule("channel gate", SQUARE, channel_inputs, GATE),
    "channel_delta": Rule("channel delta rule", SQUARE, channel_delta_inputs, DELTA),
}
BAR = 1e-2  # relative error of a step in bfloat16, whose result alone is rounded by 2^-9
POINTS = ((64, 16384), (16, 131072), (1, 16384), (1, 131072), (1, 1 << 20))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", choices=tuple(RULES), default="scalar")
    parser.add_argument("--B", type=int, help="with --context: one point instead of all")
    parser.add_argument("--context", type=int, help="tokens seen before the step, at most")
    parser.add_argument("--rows", choices=("contiguous", "shuffled"), default="contiguous", help="of the state")
    parser.add_argument("--peers", default="all", help="parts of names, with commas between; 'all', or '' for none")
    parser.add_argument("--budget-ms", type=int, default=100, help="repetitions of one measurement, in milliseconds")
    parser.add_argument("--commit", help="hash to record where the checkout has no .git")
    return parser.parse_args()


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source))[0] / 1e3)


def positions(kind: str, batch: int, context: int) -> Tensor:
    if kind == "full":
        return torch.full((batch,), context - 2, device="cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randint(context * 3 // 4, context - 1, (batch,), generator=generator, device="cuda")


def random_state(
    x: dict[str, Tensor], shape: Shape, context: int, kind: str, entry_dtype: torch.dtype
) -> DecodingState:
    """A state for steps of x, with entries and open tokens of random numbers: a step's time does not depend on them."""
    sizes = (shape.B, shape.H, shape.G, shape.K, shape.V, context, shape.dtype, entry_dtype)
    state = DecodingState.empty(*sizes, delta_rule="beta" in x, per_channel=x["g"].dim() == 4, device="cuda")
    for x in (state.entries, state.open_k, state.open_v):
        x.normal_()
    state.position.copy_(positions(kind, shape.B, context))
    return state


def shuffled(x: dict[str, Tensor], state: DecodingState) -> tuple[dict[str, Tensor], DecodingState]:
    """x with ``state_indices``, and the rows of the state in pages of bytes, in another order, beside free ones."""
    batch = state.batch_size
    layout = PageLayout.of_state(RecurrentMixerState(state.open_k.new_empty(batch, 3, 6144), state))
    pages = torch.zeros(batch + batch // 4, layout.nbytes, dtype=torch.int8, device="cuda")
    index = torch.randperm(len(pages), generator=torch.Generator("cuda").manual_seed(2), device="cuda")[:batch]
    view = layout.view(pages).memory
    assert isinstance(view, DecodingState)
    view.copy_rows_(index, state, torch.arange(batch, device="cuda"))
    return x | {"state_indices": index}, view


def live_bytes(state: DecodingState, position: Tensor) -> int:
    """Bytes that one step of all rows must read of the state."""
    chunk, used = position // state.chunk_size, int((position % state.chunk_size).sum())
    live = sum(int((chunk >> m & 1).sum()) for m in range(state.entries.shape[2]))
    entry = state.entries[0, :, 0].numel() * state.entries.element_size()
    token = sum(x[0, :, 0].numel() * x.element_size() for x in (state.open_k, state.open_v))
    if state.open_solve is not None:
        token += state.open_solve[0, :, 0].numel() * state.open_solve.element_size()
    if state.open_g.dim() == 4:  # of all key channels
        token += state.open_g[0, :, 0].numel() * state.open_g.element_size()
    return live * entry + used * token


def kv_cache_steps(batch: int, context: int) -> dict[str, Callable[[], Tensor]]:
    """Softmax attention of 48 query heads over a KV cache of 8 heads of 64, in the ways that PyTorch offers."""
    q = torch.randn(batch, 48, 1, 64, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(batch, 8, context, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    grouped = q.view(batch, 8, 6, 64)  # one query: nothing to mask, so that a group's heads may stand as rows

    def run(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(grouped, k, v)

        return call

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return {f"sdpa kv cache 48/8x64, {name}": run(backend) for name, backend in backends.items()}


def times(build: Callable[[], Callable], budget_ms: int, graph: bool) -> tuple[float, float, float]:
    """Median and spread, in milliseconds, of what ``build`` gives; all that it holds is let go."""
    call = build()
    return milliseconds(captured(call) if graph else call, budget_ms)


def measure(name: str, build: Callable[[], Callable], budget_ms: int, graph: bool = True, **columns) -> dict:
    """A row: times in milliseconds, or why there are none."""
    columns["timing"] = "cuda graph" if graph else "eager"
    try:
        median, low, high = times(build, budget_ms, graph)
        row = {"op": name, **columns, "ms": median, "ms_low": low, "ms_high": high}
    except Exception as error:
        row = {"op": name, **columns, "error": f"{type(error).__name__}: {error}"[:200]}
    shown = f"{row['ms'] * 1e3:8.1f} us" if "ms" in row else row["error"][:90]
    floor = f"  floor {columns['floor_ms'] * 1e3:.1f} us" if "floor_ms" in columns else ""
    floor += f" x {row['ms'] / columns['floor_ms']:.2f}" if floor and "ms" in row else ""
    print(
        f"B={columns['B']:3d} {columns['context']:8d} {name:40s} {columns.get('positions', ''):6s} {shown}{floor}",
        flush=True,
    )
    torch.cuda.empty_cache()
    return row


def check(rule: Rule, x: dict[str, Tensor], state: DecodingState) -> None:
    """End the command unless a step of the kernels gives what the plain form gives, from the same state."""
    want = rule.step(**x, state=state.clone(), advance=False, backend="torch").double()
    got = rule.step(**x, state=state, advance=False).double()
    error = float((got - want).norm() / want.norm())
    if not error <= BAR:
        sys.exit(f"the step of the {rule.name} has relative error {error:.2e} > {BAR}: nothing is timed")


def ours(rule: Rule, shape: Shape, context: int, bandwidth: float, budget_ms: int, order: str) -> list[dict]:
    rows = []
    given = rule.inputs(shape) | {"level_scales": torch.rand(shape.B, 1, shape.H, 22, device="cuda")}
    for entry_dtype in (torch.bfloat16, torch.float32):
        for kind in ("mixed", "full"):
            state = random_state(given, shape, context, kind, entry_dtype)
            read, held = live_bytes(state, state.position), state.nbytes
            x, state = (given, state) if order == "contiguous" else shuffled(given, state)
            check(rule, x, state)
            columns = dict(B=shape.B, context=context, positions=kind, entries=str(entry_dtype).removeprefix("torch."))
            columns |= dict(rows=order, live_bytes=read, state_bytes=held, floor_ms=read / bandwidth * 1e3)
            step = partial(rule.step, **x, state=state, advance=False)
            rows.append(measure(f"loglinear {rule.name} {columns['entries']}", lambda s=step: s, budget_ms, **columns))
    return rows


def main() -> None:
    args = arguments()
    rule = RULES[args.rule]
    points = POINTS if args.B is None else ((args.B, args.context),)
    bandwidth = copy_bandwidth()
    common = {**environment(), "rule": args.rule, "copy_bytes_per_s": bandwidth}
    common["commit"] = args.commit or common["commit"]
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s", flush=True)
    wanted = [part for part in args.peers.split(",") if part]
    for batch, context in points:
        shape = dataclasses.replace(rule.shape, B=batch)
        rows = ours(rule, shape, context, bandwidth, args.budget_ms, args.rows)
        peers: dict[str, Callable[[], Callable[[], object]]] = {}
        if args.rule == "scalar":
            for name in ("flash", "cudnn"):
                label = f"sdpa kv cache 48/8x64, {name}"
                peers[label] = lambda label=label, b=batch, c=context: kv_cache_steps(b, c)[label]
            peers["mamba2 selective_state_update"] = lambda shape=shape: mamba2_step(shape)
            peers["fla log_linear_attn, one token"] = lambda shape=shape, c=context: fla_log_linear_step(shape, c)
        for label, build in peers.items():
            if args.peers != "all" and not any(part in label for part in wanted):
                continue
            graph = not label.startswith("fla")  # it reads positions back to the host
            rows.append(measure(label, build, args.budget_ms, graph, B=batch, context=context))
        append("decoding", [common | row for row in rows])


if __name__ == "__main__":
    main()
