"""Times decoding of whole models, and counts what they remember, at growing contexts.

    python benchmarks/model_decoding.py                     # 21 layers of width 1,536, one row, contexts of 1K to 1M
    python benchmarks/model_decoding.py --B 16 --models log_linear_gated_deltanet gated_deltanet attention
    python experiments/decoding_figure.py --figure docs/figures/decoding.png    # draws the rows

A token goes the way of ``generate`` with a static cache: the replay of a CUDA graph and a greedy choice, nothing waited for. No
long prompt is read: states have random contents at a position shortly before the context's end, where the bits of the chunk's
number are set and a log-linear model reads the most. The tokens timed follow each other and end with the context. A time is the
median over them, its spread the 20th and 80th percentile.

"attention" is the softmax model as ``generate`` runs it: a mask over the whole buffer, since rows may stand anywhere. Its twin
"attention without mask" is the best that PyTorch offers where no key needs hiding, as at the end of the buffer: SDPA may then
split the keys between programs. Models of two layers are checked first: the last token of a text against one pass.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import StaticCache

sys.path.insert(0, str(Path(__file__).parent))
from loglinear.decoding_state import DecodingState
from loglinear.layers import RecurrentMixerState, SoftmaxAttention
from loglinear.layers.state import KVState
from loglinear.models import MIXERS, LogLinearConfig, LogLinearForCausalLM, cache_nbytes, restore_cache, snapshot_cache
from loglinear.models.cache import mixer_layers
from loglinear.models.decoding import DecodingGraph
from measure import RESULTS, append, environment
from ops_cpu import machine

NAME = "model_decoding"
UNMASKED = "attention without mask"
SIZES = ("B", "hidden_size", "layers", "vocab_size", "dtype", "entries")  # columns, and options
CONTEXTS = [1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20]
# Relative error of the last logits of two layers against one pass in the same dtype, by the coarser of weights and entries.
# Measured at the default sizes on two CPU cores: float32 1.5e-6, with the entries alone in bfloat16 3e-5 (log-linear Mamba-2)
# or 1.3e-3 (log-linear Gated DeltaNet), all in bfloat16 0.4% to 1.1%; with the state wiped out 1.4% to 60%: float32 decides.
LIMITS = {"float32": 1e-4, "bfloat16": 0.03}


class UnmaskedAttention(SoftmaxAttention):
    """The softmax mixer of a token that sees the whole buffer."""

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        if visible is None or q.shape[1] > 1:
            return super()._softmax(q, k, v, visible)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=self.grouped).transpose(1, 2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["log_linear_mamba2", "mamba2", "attention", UNMASKED]
    parser.add_argument("--models", nargs="+", default=models, choices=[*MIXERS, UNMASKED])
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, help="tokens")
    parser.add_argument("--B", type=int, default=1, help="rows")
    parser.add_argument("--hidden-size", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=21)
    parser.add_argument("--kv-heads", type=int, help="of softmax attention; default: all heads have keys of their own")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--dtype", choices=tuple(LIMITS), default="bfloat16", help="of the weights")
    parser.add_argument("--entries", choices=tuple(LIMITS), default="bfloat16", help="of log-linear states")
    parser.add_argument("--steps", type=int, default=192, help="tokens timed: three chunks, so three closings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--commit", help="hash to record where the checkout has no .git")
    args = parser.parse_args()
    if min(args.contexts) < args.steps + 8:
        parser.error(f"--contexts must be at least {args.steps + 8}, --steps and some before them: got {args.contexts}")
    return args


def build(name: str, args: argparse.Namespace, layers: int, dtype: str, entries: str) -> LogLinearForCausalLM:
    """An untrained model in evaluation mode, its weights and the entries of log-linear states in these dtypes."""
    torch.manual_seed(0)
    config = LogLinearConfig(
        mixer="attention" if name == UNMASKED else name,
        hidden_size=args.hidden_size,
        num_hidden_layers=layers,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocab_size,
        decoding_entry_dtype=entries,
    )
    with torch.device(args.device):
        model = LogLinearForCausalLM(config).to(getattr(torch, dtype)).eval()
    for module in model.modules():
        if name == UNMASKED and type(module) is SoftmaxAttention:
            module.__class__ = UnmaskedAttention
    return model


def check(name: str, args: argparse.Namespace, dtype: str, entries: str, length: int = 140) -> float:
    """Relative error of the last token's logits, eager and replayed, against one pass; exits when it is more than rounding."""
    model = build(name, args, 2, dtype, entries)
    ids = torch.randint(args.vocab_size, (2, length), device=model.device)
    want = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].double()
    cache = StaticCache(config=model.config, max_cache_len=length)
    model(ids[:, :-1], past_key_values=cache)
    step, saved, error = DecodingGraph(model, cache), snapshot_cache(cache), 0.0
    for _ in range(2):
        restore_cache(cache, saved)
        got = step(ids[:, -1:]).double()
        error = max(error, ((got - want).norm() / want.norm()).item())
    if not error < max(LIMITS[dtype], LIMITS[entries]):
        kind = f"{dtype} with entries in {entries}"
        raise SystemExit(f"{name} is wrong in {kind}: relative error {error:.1e} against one pass; nothing timed")
    return error


def cache_at(model: LogLinearForCausalLM, batch: int, context: int, position: int) -> StaticCache:
    """A cache with room for ``context`` tokens that seems to have read ``position``, its contents random.

    The inputs of the decays stay 0, so that nothing grows.
    """
    cache = StaticCache(config=model.config, max_cache_len=context)
    model(torch.zeros(batch, 1, dtype=torch.int64, device=model.device), past_key_values=cache, logits_to_keep=1)
    for layer in mixer_layers(cache):
        state = layer.state
        memory = state.memory if isinstance(state, RecurrentMixerState) else state
        names = ("state",)
        if isinstance(memory, DecodingState):
            names = ("entries", "open_k", "open_v")
        elif isinstance(memory, KVState):
            names = ("keys", "values")
        for x in (getattr(memory, name) for name in names):
            x.normal_()
        memory.position.fill_(position)
        layer.length = position
    return cache


def step_times(step: DecodingGraph, logits: Tensor, steps: int) -> list[float]:
    """Milliseconds from each of ``steps`` tokens to the next; the host runs ahead as far as it can."""
    marks: list = []

    def mark() -> None:
        if logits.is_cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    mark()
    for _ in range(steps):
        logits = step(logits.argmax(-1, keepdim=True))
        mark()
    if logits.is_cuda:
        torch.cuda.synchronize()
        return [one.elapsed_time(other) for one, other in pairwise(marks)]
    return [1e3 * (other - one) for one, other in pairwise(marks)]


def measure(model: LogLinearForCausalLM, batch: int, context: int, steps: int) -> dict:
    """Columns of one row: times, and bytes of state and of everything at its largest; or why there are none."""
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        cache = cache_at(model, batch, context, context - steps - 2)
        step = DecodingGraph(model, cache)
        logits = torch.zeros(batch, 1, device=model.device)
        for _ in range(2):  # run eagerly, then recorded
            logits = step(logits.argmax(-1, keepdim=True))
        times = step_times(step, logits, steps)
    except torch.OutOfMemoryError as error:
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    low, *_, high = statistics.quantiles(times, n=5)
    return {
        "timing": "eager" if step.replay is None else "cuda graph",
        "ms": statistics.median(times),
        "ms_low": low,
        "ms_high": high,
        "state_bytes": cache_nbytes(cache),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def parameter_bytes(model: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in model.parameters())


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Time every model at every context, and append a row for each."""
    common = machine(torch.get_num_threads()) if args.device == "cpu" else environment()
    common["commit"] = args.commit or common["commit"]
    sizes = {key: getattr(args, key) for key in (*SIZES, "steps")}
    for name in args.models:
        kinds = dict.fromkeys([("float32", "float32"), (args.dtype, args.entries)])
        errors = [check(name, args, *kind) for kind in kinds]
        model = build(name, args, args.layers, args.dtype, args.entries)
        about = {"op": "model decoding", "model": name, **sizes, "weight_bytes": parameter_bytes(model)}
        about |= {"kv_heads": model.config.num_key_value_heads, "error_against_one_pass": errors[-1]}
        rows = []
        for context in args.contexts:
            row = measure(model, args.B, context, args.steps)
            gc.collect()  # the graph's memory
            if args.device != "cpu":
                torch.cuda.empty_cache()
            rows.append({**common, **about, "context": context, **row})
            shown = row.get("error", "")[:70]
            if "ms" in row:
                shown = f"{row['ms']:8.3f} ms  ({row['ms_low']:.3f} … {row['ms_high']:.3f})  {row['timing']}"
                shown += f"  state {row['state_bytes'] / 2**20:10.1f} MiB"
            print(f"B={args.B:3d} {context:8d} {name:26s} {shown}", flush=True)
        append(NAME, rows, args.results)
        del model


def main() -> None:
    run(arguments())


if __name__ == "__main__":
    main()
