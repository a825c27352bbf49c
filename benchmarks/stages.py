"""Times of single kernels: each launch of a forward and backward pass is replayed alone, with its own arguments.

Special about this file: the launches are recorded from the host code, so that what is timed is what runs.
"""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from loglinear.kernels import scalar_gate
from loglinear.kernels.replay import tape_of
from loglinear.kernels.tuning import Launch, ScalarGateConfig, low_precision_config
from measure import milliseconds
from peers import Shape, inputs


@contextmanager
def recording():
    """Kernels run as they would, and each launch is listed as (name, a call that repeats it)."""
    launches: list[tuple[str, object]] = []
    run = JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        launches.append((self.fn.__name__, lambda: run(self, *args, grid=grid, warmup=False, **kwargs)))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def time_stages(x: dict[str, Tensor], do: Tensor, config: ScalarGateConfig, budget_ms: int, only: str = "") -> dict:
    """Kernel -> (median, 20th, 80th percentile); a kernel launched twice is two entries."""
    tape_of.cache_clear()  # a replayed call does not pass by here
    with recording() as launches:
        scalar_gate.forward(**x, config=config)
        scalar_gate.backward(do, **x, config=config)
    times: dict = {}
    for name, call in launches:
        if only in name:
            key = name if name not in times else f"{name} (again)"
            times[key] = milliseconds(call, budget_ms)
    return times


def candidates() -> list[ScalarGateConfig]:
    """Configurations worth timing: chunk, warps and depth for all kernels at once, heads per program."""
    found = []
    for chunk, warps, heads in ((64, 4, 4), (64, 4, 8), (64, 8, 8), (128, 8, 4), (128, 8, 8)):
        base = low_precision_config(chunk, warps, block_k=128, heads=heads)
        for stages in (1, 2, 3):
            launches = {
                field.name: dataclasses.replace(getattr(base, field.name), stages=stages)
                for field in dataclasses.fields(base)
                if isinstance(getattr(base, field.name), Launch)
            }
            found.append(dataclasses.replace(base, **launches))
    return found


def sweep(shape: Shape, only: str, budget_ms: int) -> list[dict]:
    """Rows of every kernel under every candidate; candidates that do not fit the device are reported and left out."""
    x = inputs(shape)
    do = torch.randn_like(x["v"])
    rows = []
    for config in candidates():
        launch = config.output
        label = f"chunk {config.chunk} warps {launch.warps} stages {launch.stages} heads {config.heads}"
        try:
            times = time_stages(x, do, config, budget_ms // 4, only)
        except Exception as error:  # out of shared memory or registers: the next candidate may fit
            print(f"{label}: {type(error).__name__}: {str(error)[:150]}", flush=True)
            continue
        rows += [
            {"kernel": name, "label": label, "ms": t[0], "ms_p20": t[1], "ms_p80": t[2]} for name, t in times.items()
        ]
        print(
            f"{label}: " + "  ".join(f"{name.removesuffix('_kernel')} {t[0]:.3f}" for name, t in times.items()),
            flush=True,
        )
    return rows
