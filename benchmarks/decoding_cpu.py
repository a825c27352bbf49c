"""Time of one decoding step of one layer's op on this CPU, at growing contexts.

    python benchmarks/decoding_cpu.py            # 48 heads of 128 x 64, one row, float32; half a minute

Two kinds of positions: "mixed", the mean over positions drawn evenly from the last quarter of the context, and "full", the one
before its end, where every bit of the chunk number is set. Steps of all contexts are timed in turn, so that a disturbance
meets them alike; a time is the median over the rounds, its spread the quartiles. First of all a step is checked against the
dense reference in float64. Appends one JSON row per context and kind to ``--output``; exits with status 1 when the longest
context takes more than 2.2 times as long as the shortest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from loglinear import (
    DecodingState,
    log_linear_attention,
    log_linear_attention_step,
    log_linear_delta_rule,
    log_linear_delta_rule_step,
)
from ops_cpu import machine

SHAPE = {"B": 1, "H": 48, "G": 1, "K": 128, "V": 64}
CONTEXTS = (1024, 4096, 16384, 131072)
MAX_RATIO = 2.2
STEPS = {"scalar_gate": log_linear_attention_step, "delta_rule": log_linear_delta_rule_step}
OPS = {"scalar_gate": log_linear_attention, "delta_rule": log_linear_delta_rule}


def make_inputs(rule: str, length: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tokens by argument name, with keys of unit length."""
    gen = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(SHAPE["B"], length, *size, generator=gen, dtype=dtype)

    H, G, K, V = (SHAPE[name] for name in "HGKV")
    k = torch.nn.functional.normalize(normal(G, K), dim=-1)
    x = {"q": normal(G, K), "k": k, "v": normal(H, V), "g": -0.1 * normal(H).exp(), "level_scales": normal(H, 18).exp()}
    return x | ({"beta": normal(H).sigmoid()} if rule == "delta_rule" else {})


def check(rule: str, length: int = 200) -> float:
    """Relative error of steps against one pass in float64; raises when it is not rounding."""
    x = make_inputs(rule, length, torch.float64)
    expected = OPS[rule](**x)[0]
    sizes = (SHAPE[name] for name in ("B", "H", "G", "K", "V"))
    state = DecodingState.empty(*sizes, length, torch.float64, delta_rule=rule == "delta_rule")
    got = torch.cat([STEPS[rule](**{n: y[:, t : t + 1] for n, y in x.items()}, state=state) for t in range(length)], 1)
    error = ((got - expected).norm() / expected.norm()).item()
    if not error < 1e-10:
        raise SystemExit(f"{rule} is wrong: relative error {error:.1e} against one pass; nothing timed")
    return error


def state_at(rule: str, context: int) -> DecodingState:
    """A state of random numbers with room for the context: a step's time does not depend on them."""
    sizes = (SHAPE[name] for name in ("B", "H", "G", "K", "V"))
    state = DecodingState.empty(*sizes, context, torch.float32, delta_rule=rule == "delta_rule")
    for x in (state.entries, state.open_k, state.open_v):
        x.normal_()
    return state


def measure(rule: str, rounds: int) -> dict[tuple[int, str], list[float]]:
    """(context, kind) -> seconds of single steps."""
    x = make_inputs(rule, 1)
    states = {context: state_at(rule, context) for context in CONTEXTS}
    times: dict[tuple[int, str], list[float]] = {}
    gen = torch.Generator().manual_seed(1)
    for _ in range(rounds):
        for context, state in states.items():
            drawn = int(torch.randint(context * 3 // 4, context - 1, (), generator=gen))
            for kind, position in (("mixed", drawn), ("full", context - 2)):
                state.position.fill_(position)
                begin = time.perf_counter()
                STEPS[rule](**x, state=state, advance=False)
                times.setdefault((context, kind), []).append(time.perf_counter() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "decoding_cpu.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    common = {"shape": SHAPE, "dtype": "float32", **machine(args.threads)}
    missed = []
    for rule in STEPS:
        error = check(rule)
        times = measure(rule, args.rounds)
        middle = {key: statistics.median(values) * 1e3 for key, values in times.items()}
        with args.output.open("a") as file:
            for (context, kind), values in times.items():
                low, _, high = statistics.quantiles(values, n=4)
                row = {"op": rule, "context": context, "positions": kind, "ms": middle[context, kind]}
                row |= {
                    "ms_low": low * 1e3,
                    "ms_high": high * 1e3,
                    "rounds": len(values),
                    "error_against_one_pass": error,
                }
                file.write(json.dumps(row | common) + "\n")
                print(
                    f"{rule:12s} {context:7d} {kind:5s} {row['ms']:7.3f} ms  ({row['ms_low']:.3f} … {row['ms_high']:.3f})"
                )
        for kind in ("mixed", "full"):
            ratio = middle[CONTEXTS[-1], kind] / middle[CONTEXTS[0], kind]
            print(f"{rule:12s} {kind}: {CONTEXTS[-1]} tokens take {ratio:.2f} times as long as {CONTEXTS[0]}")
            missed += [(rule, kind)] if ratio > MAX_RATIO else []
    if missed:
        raise SystemExit(f"more than {MAX_RATIO} times: {missed}")


if __name__ == "__main__":
    main()
