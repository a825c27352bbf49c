"""LAUNCHING: scratch memory and launches of kernels. The first call of a kind is recorded, and later calls repeat its launches.

Below some thousand tokens the host is slower than the GPU. It works out sizes, and Triton checks every argument of every
launch. This work takes several times as long as the launches themselves, and it depends on dtypes, shapes, strides and
alignments alone. It is therefore done once for each kind of call (plan.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from loglinear.kernels.tree.bundles import members_of
from loglinear.kernels.tree.plan import Plan, Recording, placed
from loglinear.kernels.tree.problem import token_rows

_local = threading.local()


def recording() -> Recording | None:
    """The recording of this thread, if a call is being recorded."""
    return getattr(_local, "recording", None)


def record(note: Recording | None) -> None:
    """Begin to note what this thread allocates and launches, or end it with None."""
    _local.recording = note


def memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory. Tests replace it by memory full of NaN."""
    return torch.empty(shape, dtype=dtype, device=device)


@contextmanager
def into(places: list[Tensor]) -> Iterator[None]:
    """Calls of this thread that are repeated, and whose results are as large as ``places``, write them there."""
    _local.places = places
    try:
        yield
    finally:
        _local.places = None


def results(
    layouts: Sequence[tuple[Sequence[int], torch.dtype] | None], device: torch.device
) -> tuple[Tensor | None, ...]:
    """Memory for the results (shape, dtype) of a call; None stays None."""
    places = getattr(_local, "places", None)
    if places is None or [x for x in layouts if x is not None] != [(y.shape, y.dtype) for y in places]:
        return tuple(None if x is None else memory(*x, device) for x in layouts)
    rest = iter(places)
    return tuple(None if x is None else next(rest) for x in layouts)


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for results and intermediates."""
    made, note = memory(shape, dtype, device), recording()
    if note is not None:
        note.allocated(made)
    return made


def launch(kernel, programs: int, *arguments, **constants) -> None:
    """Start ``programs`` programs of a kernel.

    arguments: tensors, numbers and bundles of these, in the kernel's order; constants: its compile-time arguments, which come
    after them, and launch options.
    """
    device = next(x.device for x in members_of(arguments) if isinstance(x, Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        compiled = kernel[(programs,)](*arguments, **constants)
    note = recording()
    if note is not None:
        note.launched(compiled, programs, [*arguments, *(constants[x] for x in kernel.arg_names[len(arguments) :])])


def current_stream(device: torch.device) -> int:
    """The stream as Triton's launcher takes it. ``torch.cuda.current_stream`` would make an object of Python first."""
    return triton.runtime.driver.active.get_current_stream(device.index)


def addresses_of(tensors: Iterable[Tensor | None]) -> list[int]:
    """Where they are, 0 for None."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def play(plan: Plan, inputs: list[int], device: torch.device) -> tuple[Tensor | None, ...]:
    """The results of a plan for other inputs of the same kind, at these addresses, on the current stream."""
    made = results(plan.results, device)
    whole = memory((plan.scratch,), torch.uint8, device) if plan.scratch else None
    stream = current_stream(device)
    for run, programs, function, metadata, arguments in placed(plan, *inputs, *addresses_of((*made, whole))):
        run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments)
    return made


@lru_cache(maxsize=512)
def plans_of(*kind: Any) -> list[Plan | None]:
    """The plan of one kind of call, in a list: empty until there is one, ``[None]`` if the call cannot be repeated."""
    return []


def replay(
    function: Callable[..., tuple[Tensor | None, ...]], inputs: list[Tensor | None], *settings: Any, rows: int = 0
) -> tuple[Any, ...]:
    """``function(inputs, *settings)``, by its plan if there is one.

    Args:
        function: allocates by ``scratch`` and launches by ``launch``, and does nothing else on the device. Its results are
            whole scratch.
        inputs: at least one tensor; all on one device. settings: hashable; with the inputs' device, dtypes, shapes, strides
            and alignment they decide all that the function does. rows: how many inputs, from the first on, the function gets
            as ``token_rows`` lays them out.
    """
    device = next(x.device for x in inputs if x is not None)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return replay(function, inputs, *settings, rows=rows)
    addresses = addresses_of(inputs)
    kind = [None if x is None else (x.dtype, x.shape, x.stride(), y % 16) for x, y in zip(inputs, addresses)]
    plans = plans_of(function, device, *settings, *kind)
    if plans:
        return function(inputs, *settings) if plans[0] is None else play(plans[0], addresses, device)
    laid_out = [x if x is None or i >= rows else token_rows(x) for i, x in enumerate(inputs)]
    if any(x is not y for x, y in zip(laid_out, inputs)):
        return replay(function, laid_out, *settings)
    # Two inputs may be one tensor here and two tensors in the next call: each gets an identity of its own.
    own = [None if x is None else x.detach() for x in inputs]
    note = Recording(tuple(own))  # what the function puts into its list is no input
    record(note)
    try:
        made = function(own, *settings)
    finally:
        record(None)
    plans.append(note.plan(made))
    return made
