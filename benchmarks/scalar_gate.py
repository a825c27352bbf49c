"""Times the scalar-gate kernels and their peers in one process, after checking that ours are right.

    python benchmarks/scalar_gate.py                          # the shape of the paper: B=2, T=16384, H=48, G=1, K=128, V=64
    python benchmarks/scalar_gate.py --T 4096 --peers ""      # ours alone
    python benchmarks/scalar_gate.py --sweep                  # every configuration, kernel by kernel, ours alone

Rows are appended to benchmarks/results/scalar_gate.jsonl after each op (--sweep: scalar_gate_sweep.jsonl).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from loglinear.kernels.tuning import scalar_gate_config
from measure import append, captured, environment, milliseconds, peak_bytes
from peers import Run, Shape, inputs, loglinear_op, peers
from stages import sweep, time_stages
from verify import Failure, verify


def time_op(name: str, run: Run, budget_ms: int, rows: list[dict]) -> None:
    """Append rows of an op: forward, and forward + backward, as its user calls it; then the second as a CUDA graph."""
    rows.append(row(name, "forward", milliseconds(run.call, budget_ms), peak_bytes(run.call)))
    both = run.forward_backward()
    rows.append(row(name, "forward+backward", milliseconds(both, budget_ms), peak_bytes(both)))
    rows.append(row(name, "forward+backward, captured", milliseconds(captured(both), budget_ms)))


def measure_op(run: Run, budget_ms: int) -> list[dict]:
    """Rows of the public op."""
    rows: list[dict] = []
    time_op("loglinear", run, budget_ms, rows)
    given, o = run.inputs, run.call()
    rows[1]["inputs_bytes"] = sum(y.numel() * y.element_size() for y in (*given, o))  # with the gradient of o
    rows[1]["inputs_outputs_gradients_bytes"] = 2 * rows[1]["inputs_bytes"]
    return rows


def measure_ours(shape: Shape, config, budget_ms: int, stages: bool) -> list[dict]:
    """Rows of the public op and, if asked for, of every kernel."""
    rows = measure_op(loglinear_op(shape), budget_ms)
    if stages:
        x = inputs(shape)
        do = torch.randn_like(x["v"])
        rows += [row("loglinear", name, time) for name, time in time_stages(x, do, config, budget_ms // 4).items()]
    return rows


def row(name: str, what: str, time: tuple[float, float, float], peak: int | None = None) -> dict:
    median, low, high = time
    return {"name": name, "what": what, "ms": median, "ms_p20": low, "ms_p80": high, "peak_bytes": peak}


def measure_peer(name: str, build, shape: Shape, budget_ms: int) -> list[dict]:
    """Rows of one peer. A failure is a row that says why."""
    rows: list[dict] = []
    try:
        time_op(name, build(shape), budget_ms, rows)
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
    for name, default in (("B", 2), ("T", 16384), ("H", 48), ("G", 1), ("K", 128), ("V", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--peers", default="all", help="parts of names, with commas between; 'all', or '' for none")
    parser.add_argument("--softmax-heads", type=int, default=16)
    parser.add_argument("--softmax-width", type=int, default=96)
    parser.add_argument("--budget-ms", type=int, default=200, help="repetitions of one measurement, in milliseconds")
    parser.add_argument("--sweep", action="store_true", help="time every kernel under many configurations instead")
    parser.add_argument("--stages", action="store_true", help="time every kernel too")
    parser.add_argument("--commit", help="hash to record where the checkout has no .git")
    parser.add_argument("--skip-check", action="store_true", help="for profiling; no rows are written")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/scalar_gate.py needs a CUDA device")
    shape = Shape(args.B, args.T, args.H, args.G, args.K, args.V, getattr(torch, args.dtype))
    columns = environment() | dataclasses.asdict(shape) | {"dtype": args.dtype}
    if args.commit:
        columns["commit"] = args.commit
    if args.sweep:
        print(append("scalar_gate_sweep", [r | columns for r in sweep(shape, delta=False)]))
        return
    config = scalar_gate_config(shape.dtype, shape.K, shape.V)
    if not args.skip_check:
        try:
            print(verify(shape, config))
        except Failure as failure:
            raise SystemExit(f"wrong results, nothing timed: {failure}") from failure
    columns["config"] = dataclasses.asdict(config)

    def keep(rows: list[dict]) -> None:
        show(rows)
        if not args.skip_check:
            append("scalar_gate", [columns | r for r in rows])
        torch.cuda.empty_cache()

    keep(measure_ours(shape, config, args.budget_ms, args.stages))
    for name, build in peers(args.softmax_heads, args.softmax_width).items():
        if args.peers == "all" or any(part in name for part in args.peers.split(",") if part):
            keep(measure_peer(name, build, shape, args.budget_ms))


if __name__ == "__main__":
    main()
