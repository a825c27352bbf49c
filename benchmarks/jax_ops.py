r"""Time of the ops in JAX, beside the log-linear op of jax-linear-attention, in one process.

    python benchmarks/jax_ops.py scalar_gate --peer       # B=2, T=16384, H=48, G=1, K=128, V=64, bfloat16: the paper's shape
    python benchmarks/jax_ops.py delta_rule               # B=2, T=16384, H=G=16, K=V=128
    python benchmarks/jax_ops.py scalar_gate --T 131072 --B 1
    python benchmarks/jax_ops.py scalar_gate --cpu        # B=1, T=4096, H=G=4, K=V=64, float32, beside our PyTorch ops

The peer is ``pip install jax-linear-attention==0.1.0`` (Python 3.12). Before a time the command checks three rows of the
output against a float64 recurrence in NumPy, and stops where the error is not rounding. A time is the median of calls that
each wait for the device, with the 20th and 80th percentile; ``ms_queued`` is that of calls in a row, without such a wait
between them. Compilation is timed by itself. Rows are appended to
``results/jax_ops.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

# Before JAX is imported: docs/jax.md has the crash.
if version("jaxlib") == "0.10.2":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_experimental_ynn_fusion_type="

import jax
import jax.numpy as jnp
import numpy as np

from loglinear.jax import forward, log_linear_attention, log_linear_delta_rule

Arrays = dict[str, jax.Array]
SHAPES = {
    "scalar_gate": {"B": 2, "T": 1 << 14, "H": 48, "G": 1, "K": 128, "V": 64},
    "delta_rule": {"B": 2, "T": 1 << 14, "H": 16, "G": 16, "K": 128, "V": 128},
}
CPU = {"B": 1, "T": 1 << 12, "H": 4, "G": 4, "K": 64, "V": 64}
BARS = {"float32": 1e-4, "bfloat16": 3e-2}  # of a row's relative error; sums of T products of rounded inputs


def make_inputs(rule: str, size: dict[str, int], dtype: str) -> Arrays:
    """Arguments by name."""
    B, T, H, G, K, V = (size[name] for name in "BTHGKV")
    keys = iter(jax.random.split(jax.random.key(0), 8))
    normal = lambda *axes: jax.random.normal(next(keys), axes, jnp.float32)  # noqa: E731
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    x = {"q": unit(normal(B, T, G, K)), "k": unit(normal(B, T, G, K)), "v": normal(B, T, H, V)}
    x = {name: y.astype(dtype) for name, y in x.items()}
    x |= {"g": -0.1 * jnp.exp(normal(B, T, H)), "level_scales": jnp.exp(normal(B, T, H, (T - 1).bit_length() + 1))}
    return x | ({"beta": jax.nn.sigmoid(normal(B, T, H))} if rule == "delta_rule" else {})


def expected_row(x: Arrays, t: int) -> np.ndarray:
    """Output of token t of the first row's first head in float64, from the last token to the first."""
    q, k, v = (np.asarray(x[name][0, :, 0], np.float64) for name in ("q", "k", "v"))
    g, scales = (np.asarray(x[name][0, :, 0], np.float64) for name in ("g", "level_scales"))
    beta = np.asarray(x["beta"][0, :, 0], np.float64) if "beta" in x else None
    out, row = np.zeros(v.shape[1]), q[t]
    for s in range(t, -1, -1):
        score = (row @ k[s]) * (1.0 if beta is None else beta[s])
        out += scales[t, (t ^ s).bit_length()] * score * v[s]
        row = np.exp(g[s]) * (row if beta is None else row - score * k[s])
    return out


def verify(call: Callable[[Arrays], jax.Array], x: Arrays, dtype: str) -> float:
    """The largest relative error of three rows. Raises SystemExit where it is not rounding."""
    o, length = call(x), x["q"].shape[1]
    errors = []
    for t in (length // 3, length // 2, length - 1):
        want = expected_row(x, t)
        errors.append(float(np.linalg.norm(np.asarray(o[0, t, 0], np.float64) - want) / np.linalg.norm(want)))
    if not max(errors) <= BARS[dtype]:
        raise SystemExit(f"the output is wrong: relative errors {errors}, at most {BARS[dtype]}")
    return max(errors)


def peer(x: Arrays) -> jax.Array:
    """jax-linear-attention's op, which has a query and key head for each value head."""
    from jla.ops.log_linear import log_linear_simple_gla_chunked

    heads = x["v"].shape[2]
    q, k = (jnp.repeat(x[name], heads // x[name].shape[2], axis=2) for name in ("q", "k"))
    return log_linear_simple_gla_chunked(q, k, x["v"], x["g"], x["level_scales"], scale=1.0)[0]


def compiled(function: Callable[..., object], x: Arrays) -> tuple[Callable[..., jax.Array], dict[str, float]]:
    """The function, compiled, and the columns about that."""
    start = time.perf_counter()
    executable = jax.jit(function).lower(x).compile()
    columns: dict[str, float] = {"compile_s": time.perf_counter() - start}
    memory = executable.memory_analysis()
    return executable, columns | ({} if memory is None else {"temporary_bytes": memory.temp_size_in_bytes})


def environment(args: argparse.Namespace) -> dict[str, object]:
    """The columns that all rows of a run share."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    here = {"capture_output": True, "text": True, "cwd": Path(__file__).parent}
    commit = args.commit or subprocess.run(describe, check=False, **here).stdout.strip() or "unknown"
    device = jax.devices()[0]
    name = f"{os.cpu_count()} cores, {platform.machine()}" if device.platform == "cpu" else device.device_kind
    return {"device": name, "jax": jax.__version__, "commit": commit, "date": time.strftime("%Y-%m-%d")}


def append(args: argparse.Namespace, row: dict[str, object]) -> None:
    """Print a row, and write it behind the others."""
    compiled = f", compiled in {row['compile_s']:.1f} s" if "compile_s" in row else ""
    in_a_row = f", {row['ms_queued']:.3f} in a row" if "ms_queued" in row else ""
    print(f"{row['op']}, {row['implementation']}, {row['pass']}: {row['ms']:.3f} ms{in_a_row}{compiled}", flush=True)
    with args.output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def torch_rows(rule: str, x: dict[str, np.ndarray], seconds: float) -> list[dict[str, object]]:
    """Our PyTorch ops on the same inputs, with as many threads as XLA has; in a process without XLA's."""
    import torch

    import loglinear

    torch.set_num_threads(os.cpu_count() or 1)
    y = {name: torch.from_numpy(z).requires_grad_() for name, z in x.items()}
    op = loglinear.log_linear_delta_rule if rule == "delta_rule" else loglinear.log_linear_attention
    both = lambda: torch.autograd.grad(op(**y)[0].sum(), list(y.values()))  # noqa: E731
    rows: list[dict[str, object]] = []
    for direction, call in {"forward": lambda: op(**y)[0], "forward + backward": both}.items():
        call()
        implementation = f"loglinear, PyTorch {torch.__version__}"
        rows.append({"implementation": implementation, "pass": direction, **spread(call, seconds)})
    return rows


def spread(call: Callable[[], object], seconds: float) -> dict[str, float]:
    """Milliseconds of a call, which waits for its end."""
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    low, median, high = (1e3 * float(np.quantile(times, at)) for at in (0.2, 0.5, 0.8))
    return {"ms": median, "ms_p20": low, "ms_p80": high, "ms_least": 1e3 * min(times)}


def queued(call: Callable[[], object], seconds: float, count: int = 10) -> float:
    """Milliseconds of a call among ``count`` in a row, of which the last alone is waited for: the host's work is hidden."""

    def series() -> None:
        for _ in range(count):
            out = call()
        jax.block_until_ready(out)

    return spread(series, seconds)["ms"] / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rule", choices=SHAPES)
    parser.add_argument("--peer", action="store_true", help="time jax-linear-attention too")
    parser.add_argument("--cpu", action="store_true", help="the sizes and the dtype of a CPU, and our PyTorch ops")
    parser.add_argument("--backend", choices=["xla", "pallas", "torch"], default="xla")
    parser.add_argument("--block-chunks", type=int, help="chunks in a block of the scan, to tune it")
    parser.add_argument("--dtype", choices=BARS, help="default: bfloat16, and float32 on a CPU")
    parser.add_argument("--commit", help="hash to record where the checkout has no .git")
    parser.add_argument("--seconds", type=float, default=1.0, help="of repetitions, for each time")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "jax_ops.jsonl")
    for name in "BTHGKV":
        parser.add_argument(f"--{name}", type=int)
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if args.cpu else "bfloat16")
    if args.cpu:
        jax.config.update("jax_platforms", "cpu")
    if args.block_chunks:
        forward.BLOCK_CHUNKS = args.block_chunks
    standard = CPU if args.cpu else SHAPES[args.rule]
    size = {name: value if (given := getattr(args, name)) is None else given for name, value in standard.items()}
    if args.peer and args.rule != "scalar_gate":
        parser.error("--peer: jax-linear-attention has a log-linear op of the scalar gate alone")
    x = make_inputs(args.rule, size, args.dtype)
    op = log_linear_delta_rule if args.rule == "delta_rule" else log_linear_attention
    ours = lambda x: op(**x, backend=args.backend)[0]  # noqa: E731
    calls: dict[str, Callable[[Arrays], jax.Array]] = {f"loglinear.jax, {args.backend}": ours}
    calls |= {"jax-linear-attention": peer} if args.peer else {}
    columns = {**environment(args), **size, "dtype": args.dtype, "block_chunks": forward.block_chunks()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name, call in calls.items():
        loss = lambda x, call=call: call(x).astype(jnp.float32).sum()  # noqa: E731
        error = 0.0
        for direction, function in {"forward": call, "forward + backward": jax.value_and_grad(loss)}.items():
            executable, row = compiled(function, x)
            error = verify(executable, x, args.dtype) if direction == "forward" else error
            jax.block_until_ready(executable(x))
            time_of = spread(lambda executable=executable: jax.block_until_ready(executable(x)), args.seconds)
            if not args.cpu:
                time_of["ms_queued"] = queued(lambda executable=executable: executable(x), args.seconds)
            label = {"op": args.rule, "implementation": name, "pass": direction}
            append(args, label | time_of | row | {"error": error, **columns})
    if args.cpu:
        arrays = {name: np.array(y) for name, y in x.items()}
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own_process:
            for row in own_process.submit(torch_rows, args.rule, arrays, args.seconds).result():
                append(args, {"op": args.rule, **row, **columns})


if __name__ == "__main__":
    main()
