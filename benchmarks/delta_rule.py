"""Times the delta-rule kernels and their peers in one process, after checking that ours are right.

    python benchmarks/delta_rule.py                          # B=2, T=16384, H=G=16, K=V=128
    python benchmarks/delta_rule.py --B 1 --H 8 --T 131072 --peers "fla gated"

The peer "fla 0.2.2" is looked for in --old-fla: ``pip install --no-deps --target FOLDER flash-linear-attention==0.2.2``.
Rows are appended to benchmarks/results/delta_rule.jsonl after each op (--sweep: delta_rule_sweep.jsonl).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from loglinear.kernels.tuning import delta_rule_config
from measure import append, environment
from peers import Shape, delta_peers, loglinear_delta
from scalar_gate import measure_op, measure_peer, show
from stages import sweep
from verify import Failure, verify_delta_rule


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("B", 2), ("T", 16384), ("H", 16), ("K", 128), ("V", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--G", type=int, help="q/k heads; default: H")
    parser.add_argument("--peers", default="all", help="parts of names, with commas between; 'all', or '' for none")
    parser.add_argument("--softmax-heads", type=int, default=16)
    parser.add_argument("--softmax-width", type=int, default=128)
    parser.add_argument("--budget-ms", type=int, default=200, help="repetitions of one measurement, in milliseconds")
    parser.add_argument("--old-fla", default=".peers/fla-0.2.2", help="folder with flash-linear-attention 0.2.2")
    parser.add_argument("--sweep", action="store_true", help="time every kernel under many configurations instead")
    parser.add_argument("--commit", help="hash to record where the checkout has no .git")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    shape = Shape(args.B, args.T, args.H, args.G or args.H, args.K, args.V)
    columns = {**dataclasses.asdict(shape), "dtype": "bfloat16", **environment()}
    columns["commit"] = args.commit or columns["commit"]
    if args.sweep:
        print(append("delta_rule_sweep", [r | columns for r in sweep(shape, delta=True)]))
        return
    try:
        print(verify_delta_rule(shape))
    except Failure as failure:
        raise SystemExit(f"wrong results, nothing timed: {failure}") from failure
    torch.cuda.empty_cache()
    columns["config"] = dataclasses.asdict(delta_rule_config(shape.dtype, shape.K, shape.V))

    def keep(rows: list[dict]) -> None:
        show(rows)
        append("delta_rule", [columns | r for r in rows])
        torch.cuda.empty_cache()

    keep(measure_op(loglinear_delta(shape), args.budget_ms))
    for name, build in delta_peers(args.softmax_heads, args.softmax_width, args.old_fla).items():
        if args.peers == "all" or any(part in name for part in args.peers.split(",") if part):
            keep(measure_peer(name, build, shape, args.budget_ms))


if __name__ == "__main__":
    main()
