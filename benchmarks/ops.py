"""Times an op of one transition and its peers in one process, after checking that ours is right.

    python benchmarks/ops.py scalar_gate                     # B=2, T=16384, H=48, G=1, K=128, V=64: the shape of the paper
    python benchmarks/ops.py scalar_gate --T 4096 --peers "" # ours alone
    python benchmarks/ops.py scalar_gate --sweep             # every configuration, kernel by kernel, ours alone
    python benchmarks/ops.py delta_rule                      # B=2, T=16384, H=G=16, K=V=128
    python benchmarks/ops.py delta_rule --B 1 --H 8 --T 131072 --peers "fla gated"
    python benchmarks/ops.py delta_rule --peers "" --calls 1,2,4        # and prefill that goes on from states
    python benchmarks/ops.py channel_gate                    # the same sizes; channel_delta_rule too

The peer "fla 0.2.2" is looked for in --old-fla: ``pip install --no-deps --target FOLDER flash-linear-attention==0.2.2``.
Rows are appended to benchmarks/results/<transition>.jsonl after each op (--sweep: <transition>_sweep.jsonl).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import peers
import stages
from loglinear import log_linear_attention, log_linear_delta_rule
from loglinear.kernels.tuning import channel_config, delta_rule_config, scalar_gate_config
from measure import append, captured, environment, milliseconds, peak_bytes
from peers import Run, Shape
from verify import LIMITS, Failure, relative, verify


@dataclass(frozen=True)
class Rule:
    """One transition to time.

    Attributes:
        shape: the default sizes. softmax: heads and width of softmax attention beside it.
        inputs: of the op, by name. op: ours. peers: the others by their names in rows.
        config: the kernels' configuration for a dtype, K and V; candidates: the configurations that --sweep tries. Either may
            be None.
    """

    shape: Shape
    softmax: tuple[int, int]
    inputs: Callable[..., dict[str, Tensor]]
    op: Callable[..., tuple[Tensor, Any]]
    peers: Mapping[str, Callable[[Shape], Run]]
    config: Callable[..., Any] | None = None
    candidates: Callable[[], list] | None = None


PAPER, SQUARE = Shape(2, 1 << 14, 48, 1, 128, 64), Shape(2, 1 << 14, 16, 16, 128, 128)
GATE = partial(log_linear_attention, backend="triton")
DELTA = partial(log_linear_delta_rule, backend="triton")
RULES = {
    "scalar_gate": Rule(PAPER, (16, 96), peers.inputs, GATE, peers.GATED, scalar_gate_config, stages.scalar_candidates),
    "delta_rule": Rule(
        SQUARE, (16, 128), peers.delta_inputs, DELTA, peers.DELTA, delta_rule_config, stages.delta_candidates
    ),
    "channel_gate": Rule(SQUARE, (16, 128), peers.channel_inputs, GATE, peers.CHANNEL_GATED, channel_config),
    "channel_delta_rule": Rule(SQUARE, (16, 128), peers.channel_delta_inputs, DELTA, peers.CHANNEL_DELTA),
}


def time_op(name: str, run: Run, budget_ms: int, rows: list[dict], forward: bool = False) -> None:
    """Append rows of an op: forward, and unless it is ``forward`` alone, forward + backward, as its user calls it; then the
    second as a CUDA graph.
    """
    rows.append(row(name, "forward", milliseconds(run.call, budget_ms), peak_bytes(run.call)))
    if forward:
        return
    both = run.forward_backward()
    rows.append(row(name, "forward+backward", milliseconds(both, budget_ms), peak_bytes(both)))
    rows.append(row(name, "forward+backward, captured", milliseconds(captured(both), budget_ms)))


def ours(rule: Rule, shape: Shape, device: str = "cuda") -> Run:
    """Our op on inputs that need gradients."""
    x = {name: leaf.requires_grad_() for name, leaf in rule.inputs(shape, device).items()}
    return Run(lambda: rule.op(**x)[0], tuple(x.values()))


def measure_ours(run: Run, budget_ms: int, each_kernel: bool) -> list[dict]:
    """Rows of our op and, if asked for, of every kernel."""
    rows: list[dict] = []
    time_op("loglinear", run, budget_ms, rows)
    given, o = run.inputs, run.call()
    rows[1]["inputs_bytes"] = sum(y.numel() * y.element_size() for y in (*given, o))  # with the gradient of o
    rows[1]["inputs_outputs_gradients_bytes"] = 2 * rows[1]["inputs_bytes"]
    if each_kernel:
        times = stages.time_stages(run.forward_backward(), budget_ms // 4)
        rows += [row("loglinear", name, time) for name, time in times.items()]
    return rows


def in_calls(rule: Rule, shape: Shape, calls: int, device: str = "cuda") -> Run:
    """Our op on the same inputs in so many calls, each from the state of the call before it, to a final state."""
    x = rule.inputs(shape, device)

    @torch.no_grad()
    def call() -> Tensor:
        state, outputs = None, []
        for part in zip(*(y.chunk(calls, 1) for y in x.values())):
            o, state = rule.op(**dict(zip(x, part)), initial_state=state, output_final_state=True)
            outputs.append(o)
        return torch.cat(outputs, 1)

    return Run(call, ())


def measure_calls(rule: Rule, shape: Shape, budget_ms: int, counts: list[int], device: str = "cuda") -> list[dict]:
    """Rows of the forward pass in each number of calls. Raises Failure where the output is not that of a single call."""
    rows: list[dict] = []
    expected = ours(rule, shape, device).call().detach()
    for calls in counts:
        run = in_calls(rule, shape, calls, device)
        error = relative(run.call(), expected.double())
        if error > 2 * LIMITS[shape.dtype]:
            raise Failure(f"relative error of {calls} calls {error:.2e}; the limit is {2 * LIMITS[shape.dtype]:.1e}")
        what = f"forward, states, {calls} call{'s'[: calls > 1]}"
        rows.append(row("loglinear", what, milliseconds(run.call, budget_ms), peak_bytes(run.call)))
    return rows


def row(name: str, what: str, time: tuple[float, float, float], peak: int | None = None) -> dict:
    median, low, high = time
    return {"name": name, "what": what, "ms": median, "ms_p20": low, "ms_p80": high, "peak_bytes": peak}


def measure_peer(
    name: str, build: Callable[[Shape], Run], shape: Shape, budget_ms: int, forward: bool = False
) -> list[dict]:
    """Rows of one peer. A failure is a row that says why."""
    rows: list[dict] = []
    try:
        time_op(name, build(shape), budget_ms, rows, forward)
    except Exception as error:  # whatever a peer raises, the others are still to be timed
        rows.append({"name": name, "what": "failed", "reason": f"{type(error).__name__}: {error}"[:300]})
    return rows


def show(rows: list[dict]) -> None:
    for r in rows:
        if r["what"] == "failed":
            print(f"{r['name']:32s} not timed: {r['reason']}")
        else:
            peak = "" if r["peak_bytes"] is None else f"  peak {r['peak_bytes'] / 2**20:8.0f} MiB"
            print(f"{r['name']:32s} {r['what']:26s} {r['ms']:9.4f} ms  ({r['ms_p20']:.4f} … {r['ms_p80']:.4f}){peak}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rule", choices=tuple(RULES), help="the transition")
    for name in ("B", "T", "H", "K", "V"):
        parser.add_argument(f"--{name}", type=int, help="default: that of the transition")
    parser.add_argument("--G", type=int, help="q/k heads; default: 1 for scalar_gate, else H")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--peers", default="all", help="parts of names, with commas between; 'all', or '' for none")
    parser.add_argument(
        "--peer-forward", action="store_true", help="of peers the forward pass alone: some tune the other for minutes"
    )
    parser.add_argument("--softmax-heads", type=int, help="default: 16")
    parser.add_argument("--softmax-width", type=int, help="default: 96 for scalar_gate, else 128")
    parser.add_argument("--old-fla", default=".peers/fla-0.2.2", help="folder with flash-linear-attention 0.2.2")
    parser.add_argument("--budget-ms", type=int, default=200, help="repetitions of one measurement, in milliseconds")
    parser.add_argument("--sweep", action="store_true", help="time every kernel under many configurations instead")
    parser.add_argument("--stages", action="store_true", help="time every kernel too")
    parser.add_argument("--calls", default="", help="numbers of calls that share the tokens, as 1,2,4, by their states")
    parser.add_argument("--commit", help="hash to record where the checkout has no .git")
    parser.add_argument("--skip-check", action="store_true", help="for profiling; no rows are written")
    args = parser.parse_args()
    if args.sweep and RULES[args.rule].candidates is None:
        parser.error(f"--sweep has no configurations of {args.rule}")
    return args


def shape_of(args: argparse.Namespace) -> Shape:
    """The sizes of the transition, with those that were given in their place."""
    default = RULES[args.rule].shape
    given = {name: getattr(args, name) for name in ("B", "T", "H", "K", "V") if getattr(args, name) is not None}
    shape = dataclasses.replace(default, **given, dtype=getattr(torch, args.dtype))
    groups = args.G or (default.G if default.G < default.H else shape.H)
    return dataclasses.replace(shape, G=groups)


def peers_of(args: argparse.Namespace) -> dict[str, Callable[[Shape], Run]]:
    """The peers that were asked for, by name."""
    rule = RULES[args.rule]
    heads, width = args.softmax_heads or rule.softmax[0], args.softmax_width or rule.softmax[1]
    found = {**rule.peers, **peers.softmax_peers(heads, width)}
    if peers.OLD in found:
        found[peers.OLD] = partial(peers.fla_gated_delta, folder=args.old_fla)
    parts = [part for part in args.peers.split(",") if part]
    return {name: found[name] for name in found if args.peers == "all" or any(part in name for part in parts)}


def main() -> None:
    args = arguments()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/ops.py needs a CUDA device")
    rule, shape = RULES[args.rule], shape_of(args)
    columns = environment() | dataclasses.asdict(shape) | {"dtype": args.dtype}
    columns["commit"] = args.commit or columns["commit"]
    if args.sweep:
        assert rule.candidates is not None
        rows = stages.sweep(shape, rule.candidates())
        print(append(f"{args.rule}_sweep", [r | columns for r in rows]))
        return
    if not args.skip_check:
        try:
            print(verify(rule.op, rule.inputs, shape))
        except Failure as failure:
            raise SystemExit(f"wrong results, nothing timed: {failure}") from failure
        torch.cuda.empty_cache()
    if rule.config is not None:
        columns["config"] = dataclasses.asdict(rule.config(shape.dtype, shape.K, shape.V))

    def keep(rows: list[dict]) -> None:
        show(rows)
        if not args.skip_check:
            append(args.rule, [columns | r for r in rows])
        torch.cuda.empty_cache()

    keep(measure_ours(ours(rule, shape), args.budget_ms, args.stages))
    if args.calls:
        keep(measure_calls(rule, shape, args.budget_ms, [int(n) for n in args.calls.split(",")]))
    for name, build in peers_of(args).items():
        keep(measure_peer(name, build, shape, args.budget_ms, args.peer_forward))


if __name__ == "__main__":
    main()
