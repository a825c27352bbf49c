"""LAUNCHING: scratch memory and launches of kernels, both noted by a recording if there is one (replay.py)."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from loglinear.kernels.tree.replay import members_of, recording


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory for results and intermediates. Tests replace it by memory full of NaN."""
    memory = torch.empty(shape, dtype=dtype, device=device)
    note = recording()
    if note is not None:
        note.allocated(memory)
    return memory


def launch(kernel, programs: int, *arguments, **constants) -> None:
    """Start ``programs`` programs of a kernel.

    arguments: tensors, numbers and bundles of these, in the kernel's order; constants: its compile-time arguments, which come
    after them, and launch options.
    """
    device = next(x.device for x in members_of(arguments)[0] if isinstance(x, torch.Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        compiled = kernel[(programs,)](*arguments, **constants)
    note = recording()
    if note is not None:
        values = [constants[name] for name in kernel.arg_names[len(arguments) :]]
        note.launched(compiled, programs, arguments, values)
