"""Time per token and peak memory of the public ops on this CPU, beside the linear form of each.

    python benchmarks/ops_cpu.py                      # the whole table, some minutes on two cores
    python benchmarks/ops_cpu.py --lengths 512 1024 --memory-length 4096 --output out/rows.jsonl

Prints microseconds per token of forward + backward (float32, B=1, H=G=4, K=V=64, median of the repeats and their spread),
the ratio of the longest length to the shortest (required: at most 2 for the log-linear ops), and the peak resident
memory of one forward at T = 131,072, measured in a process of its own (required: at most 24 GiB). First of all it checks
the ops against the dense reference in float64. Appends one JSON row per measurement to ``--output``; exits with status
1 when a required bound is missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

import loglinear
from loglinear import fenwick, reference

OPS = {"scalar_gate": loglinear.log_linear_attention, "delta_rule": loglinear.log_linear_delta_rule}
SHAPE = {"B": 1, "H": 4, "G": 4, "K": 64, "V": 64}
MAX_RATIO, MAX_GIB = 2.0, 24.0


def make_inputs(op: str, form: str, length: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    """Inputs by argument name; ``form`` is log_linear, or linear: no level_scales."""
    gen = torch.Generator().manual_seed(0)

    def normal(*widths: int) -> Tensor:
        return torch.randn(SHAPE["B"], length, SHAPE["H"], *widths, generator=gen, dtype=dtype)

    levels = fenwick.num_levels(length)
    inputs: dict[str, Tensor | None] = {
        "q": normal(SHAPE["K"]),
        "k": torch.nn.functional.normalize(normal(SHAPE["K"]), dim=-1),
        "v": normal(SHAPE["V"]),
        "g": -0.1 * normal().exp(),
        "level_scales": normal(levels).exp() if form == "log_linear" else None,
    }
    return inputs | ({"beta": normal().sigmoid()} if op == "delta_rule" else {})


def check(op: str, form: str, length: int = 300) -> float:
    """Relative error against the dense reference in float64; raises when it is not rounding."""
    x = make_inputs(op, form, length, torch.float64)
    q, k, v, g, scales, beta = (
        None if value is None else value.transpose(1, 2)
        for value in (x["q"], x["k"], x["v"], x["g"], x["level_scales"], x.get("beta"))
    )
    expected = reference.dense(q, k, v, reference.transition_of(g, beta, k), scales).transpose(1, 2)
    error = ((OPS[op](**x)[0] - expected).norm() / expected.norm()).item()
    if not error < 1e-10:
        raise SystemExit(f"{op} {form} is wrong: relative error {error:.1e} against the dense reference; nothing timed")
    return error


def seconds(op: str, form: str, length: int, repeats: int) -> list[float]:
    """Wall time of forward + backward, once per repeat, after one call that is not counted."""
    x = {
        name: value if value is None else value.requires_grad_()
        for name, value in make_inputs(op, form, length).items()
    }
    do, times = torch.ones_like(x["v"]), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        o, _ = OPS[op](**x)
        torch.autograd.grad(o, [value for value in x.values() if value is not None], do)
        times.append(time.perf_counter() - start)
    return times[1:]


def forward_gib(op: str, form: str, length: int) -> float:
    """Peak resident memory of this process after one forward."""
    x = make_inputs(op, form, length)
    with torch.no_grad():
        OPS[op](**x)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def forward_gib_apart(op: str, form: str, length: int, threads: int) -> float:
    """``forward_gib`` in a fresh process, so that nothing measured before counts."""
    command = [sys.executable, __file__, "--threads", str(threads), "--forward-only", op, form, str(length)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def machine(threads: int) -> dict[str, object]:
    """The facts about the machine on which the figures depend."""

    def first_line(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        except OSError:
            return "unknown"
        return done.stdout.strip() or ("unknown" if done.returncode else "")

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip()
            for line in info.read_text(encoding="utf-8").splitlines()
            if "model name" in line
        ]
        cpu = models[0] if models else cpu
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": first_line("git", "rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(first_line("git", "status", "--porcelain", "--", "../src")),
        "loglinear": loglinear.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "threads": threads,
    }


def measure(args: argparse.Namespace, op: str, form: str, common: dict[str, object]) -> tuple[list[dict], bool]:
    """One op in one form: its rows, printed as they come, and whether the required bounds hold."""
    error, rows, per_token = check(op, form), [], {}
    for length in args.lengths:
        times = [1e6 * t / length for t in seconds(op, form, length, args.repeats)]
        per_token[length] = statistics.median(times)
        spread = [min(times), max(times)]
        print(f"{op:12} {form:11} T={length:<7,} {per_token[length]:8.2f} µs/token  [{spread[0]:.2f}, {spread[1]:.2f}]")
        shape = {**SHAPE, "T": length, "L": fenwick.num_levels(length) if form == "log_linear" else 0}
        measured = {"median_us_per_token": per_token[length], "spread_us_per_token": spread, "repeats": args.repeats}
        rows.append({"what": "forward_backward", "shape": shape, **measured})
    ratio = per_token[max(args.lengths)] / per_token[min(args.lengths)]
    gib = forward_gib_apart(op, form, args.memory_length, args.threads)
    print(f"{op:12} {form:11} per token, T={max(args.lengths):,} over T={min(args.lengths):,}: {ratio:.2f}")
    print(f"{op:12} {form:11} peak memory of a forward at T={args.memory_length:,}: {gib:.2f} GiB")
    rows.append({"what": "ratio", "lengths": [max(args.lengths), min(args.lengths)], "ratio": ratio})
    rows.append({"what": "forward_peak_memory", "shape": {**SHAPE, "T": args.memory_length}, "gib": gib})
    label = {"op": op, "form": form, "dtype": "float32", "error_against_dense": error}
    return [{**label, **row, **common} for row in rows], form == "linear" or (ratio <= MAX_RATIO and gib <= MAX_GIB)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--memory-length", type=int, default=131_072)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ops_cpu.jsonl")
    parser.add_argument("--forward-only", nargs=3, metavar=("OP", "FORM", "T"), help="print one forward's peak GiB")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.forward_only:
        op, form, length = args.forward_only
        print(forward_gib(op, form, int(length)))
        return
    common = machine(args.threads)
    print(", ".join(f"{name} {value}" for name, value in common.items()))
    held = True
    for op in OPS:
        for form in ("log_linear", "linear"):
            rows, good = measure(args, op, form, common)
            held = held and good
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with args.output.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"rows appended to {args.output}")
    if not held:
        raise SystemExit(
            f"required: a ratio of at most {MAX_RATIO:g} and at most {MAX_GIB:g} GiB in the log-linear form"
        )


if __name__ == "__main__":
    main()
