"""Times of the single kernels of a forward and backward pass, under one configuration or many.

The launches are recorded from the host code, so the timed launches are the real ones. A sweep first compiles all candidates
side by side, one process each, because compiling takes far longer than timing.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from loglinear.kernels import decay as scalar_gate
from loglinear.kernels import delta as delta_rule
from loglinear.kernels.tree.launching import plans_of
from loglinear.kernels.tuning import (
    DeltaRuleConfig,
    Launch,
    ScalarGateConfig,
    low_precision_config,
    uniform_delta_config,
)
from measure import milliseconds
from peers import Shape, delta_inputs, inputs

Config = ScalarGateConfig | DeltaRuleConfig


@contextmanager
def recording():
    """Kernels run as they would, and each launch is listed as (name, a call that repeats it)."""
    launches: list[tuple[str, object]] = []
    run = JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        launches.append((self.fn.__name__, lambda: run(self, *args, grid=grid, warmup=False, **kwargs)))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    plans_of.cache_clear()  # a replayed call does not pass by here
    with mock.patch.object(JITFunction, "run", record):
        yield launches


def time_stages(call: Callable[[], object], budget_ms: int) -> dict[str, tuple[float, float, float]]:
    """Kernel of a call -> (median, 20th, 80th percentile), cold cache; a kernel launched twice is two entries."""
    with recording() as launches:
        call()
    times: dict[str, tuple[float, float, float]] = {}
    for name, launch in launches:
        times[name if name not in times else f"{name} (again)"] = milliseconds(launch, budget_ms)
    return times


def forward_and_backward(x: dict[str, Tensor], do: Tensor, config: Config) -> None:
    """As an eager call with gradients: the delta rule's backward gets what its forward keeps."""
    if isinstance(config, ScalarGateConfig):
        scalar_gate.forward(**x, config=config)
        scalar_gate.backward(do, **x, config=config)
    else:
        _, *kept = delta_rule.forward(**x, config=config, keep=True)
        delta_rule.backward(do, **x, config=config, kept=tuple(kept))


def time_kernels(shape: Shape, config: Config, repetitions: int) -> dict[str, float]:
    """Kernel -> milliseconds of all its launches in one forward and backward pass; those that do not fit are left out.

    Each launch is repeated where it happens, before the next: the fastest way to time many configurations, with a warm cache.
    """
    x = inputs(shape) if isinstance(config, ScalarGateConfig) else delta_inputs(shape)
    do = torch.randn_like(x["v"])
    times: dict[str, float] = {}
    failed: set[str] = set()
    run = JITFunction.run

    def timed(self, *args, grid, warmup, **kwargs):
        name = self.fn.__name__.removesuffix("_kernel")
        try:
            compiled = run(self, *args, grid=grid, warmup=warmup, **kwargs)
        except Exception as error:  # out of shared memory or registers: another configuration may fit
            if name not in failed and repetitions:
                print(f"  {name}: {type(error).__name__}: {str(error)[:100]}", flush=True)
            failed.add(name)
            return None
        if repetitions:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(repetitions):
                run(self, *args, grid=grid, warmup=warmup, **kwargs)
            end.record()
            torch.cuda.synchronize()
            times[name] = times.get(name, 0.0) + begin.elapsed_time(end) / repetitions
        return compiled

    plans_of.cache_clear()
    with mock.patch.object(JITFunction, "run", timed):
        forward_and_backward(x, do, config)
    torch.cuda.synchronize()
    return {name: ms for name, ms in times.items() if name not in failed}


def uniform(config: Config, launch: Launch) -> Config:
    """The configuration with every kernel launched alike."""
    launches = {f.name: launch for f in dataclasses.fields(config) if isinstance(getattr(config, f.name), Launch)}
    return dataclasses.replace(config, **launches)


def scalar_candidates() -> list[tuple[str, Config]]:
    """Configurations of the scalar gate worth timing, with their names: chunk, warps, depth and tile, alike for all kernels."""
    shapes = [(64, 4, (1, 2, 3), (64,)), (64, 8, (1, 2, 3), (64,)), (128, 8, (1, 2, 3), (64,))]
    return _candidates(shapes, lambda chunk, launch: low_precision_config(chunk, launch.warps, heads=12), None)


def delta_candidates() -> list[tuple[str, Config]]:
    """The same for the delta rule."""
    shapes = [(64, 4, (1, 2, 3), (32, 64, 128)), (64, 8, (2, 3), (64, 128)), (128, 8, (1, 2, 3), (32, 64, 128))]
    return _candidates(shapes, uniform_delta_config, 128)


def _candidates(shapes: list[tuple], build: Callable[[int, Launch], Config], block_k: int | None) -> list:
    launches = [
        (chunk, Launch(warps, depth, tile, block_k=block_k))
        for chunk, warps, depths, tiles in shapes
        for depth in depths
        for tile in tiles
    ]
    return [
        (f"chunk {chunk} warps {x.warps} stages {x.stages} tile {x.block_v}", uniform(build(chunk, x), x))
        for chunk, x in launches
    ]


def time_candidate(shape: Shape, label: str, config: Config, repetitions: int, compiled, turn, found) -> None:
    """Compile, and time in turn, in a process of its own: a kernel that breaks the process breaks no other candidate."""
    times: dict[str, float] = {}
    try:
        time_kernels(shape, config, repetitions=0)
        torch.cuda.empty_cache()
        compiled.release()
        with turn:
            times = time_kernels(shape, config, repetitions)
        print(f"{label}: " + "  ".join(f"{name} {ms:.3f}" for name, ms in times.items()), flush=True)
    except Exception as error:
        print(f"{label}: {type(error).__name__}: {str(error)[:150]}", flush=True)
        compiled.release()
    found.put((label, times))


def sweep(shape: Shape, named: list[tuple[str, Config]], repetitions: int = 5, patience: float = 300.0) -> list[dict]:
    """Rows of every kernel under every candidate by name, and a line for each candidate and for the best of each kernel.

    All candidates compile side by side; timing starts when they have, or after ``patience`` seconds.
    """
    context = multiprocessing.get_context("spawn")
    compiled, turn, found = context.Semaphore(0), context.Lock(), context.Queue()
    turn.acquire()
    for label, config in named:
        common = (repetitions, compiled, turn, found)
        context.Process(target=time_candidate, args=(shape, label, config, *common), daemon=True).start()
    until = time.monotonic() + patience
    ready = sum(compiled.acquire(timeout=max(until - time.monotonic(), 0.0)) for _ in named)
    print(f"{ready} of {len(named)} candidates compiled", flush=True)
    turn.release()
    rows = []
    for _ in range(ready):
        label, times = found.get()
        rows += [{"kernel": name, "label": label, "ms": ms} for name, ms in times.items()]
    for chunk in sorted({config.chunk for _, config in named}):
        own = [r for r in rows if r["label"].startswith(f"chunk {chunk} ")]
        best = [min((r for r in own if r["kernel"] == k), key=lambda r: r["ms"]) for k in {r["kernel"] for r in own}]
        print(f"chunk {chunk}, best of each: {sum(r['ms'] for r in best):.3f} ms", flush=True)
        for r in sorted(best, key=lambda r: -r["ms"]):
            print(f"  {r['kernel']:16s} {r['ms']:.3f}  {r['label']}", flush=True)
    return rows
