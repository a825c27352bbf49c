"""LAUNCHING: scratch memory and launches of kernels. A recording, if there is one, notes both (replay.py)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from loglinear.kernels.tree.replay import Recording

_local = threading.local()


def recording() -> Recording | None:
    """The recording of this thread, if a call is being recorded."""
    return getattr(_local, "recording", None)


def record(note: Recording | None) -> None:
    """Begin to note what this thread allocates and launches, or end it with None."""
    _local.recording = note


def memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory. Tests replace it by memory full of NaN."""
    return torch.empty(shape, dtype=dtype, device=device)


@contextmanager
def into(places: list[torch.Tensor]) -> Iterator[None]:
    """Calls of this thread that are repeated, and whose results are as large as ``places``, write them there."""
    _local.places = places
    try:
        yield
    finally:
        _local.places = None


def results(
    layouts: Sequence[tuple[Sequence[int], torch.dtype] | None], device: torch.device
) -> tuple[torch.Tensor | None, ...]:
    """Memory for the results (shape, dtype) of a call; None stays None."""
    places = getattr(_local, "places", None)
    if places is None or [x for x in layouts if x is not None] != [(y.shape, y.dtype) for y in places]:
        return tuple(None if x is None else memory(*x, device) for x in layouts)
    rest = iter(places)
    return tuple(None if x is None else next(rest) for x in layouts)


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
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
    device = next(x.device for x in members_of(arguments) if isinstance(x, torch.Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        compiled = kernel[(programs,)](*arguments, **constants)
    note = recording()
    if note is not None:
        note.launched(compiled, programs, [*arguments, *(constants[x] for x in kernel.arg_names[len(arguments) :])])


def members_of(arguments: Sequence) -> list:
    """The arguments, with the members of each bundle in its place. A bundle holds no other bundle."""
    return [member for x in arguments for member in (x if isinstance(x, tuple) else (x,))]
