"""DEVICES: which kernels fit into the shared memory of which GPU, as the compiler states it (test_compilation.py)."""

from __future__ import annotations

import torch

from loglinear.transition import Transition

AMPLE = 160 << 10  # bytes that data-centre GPUs from 2020 on have: A100, H100, H200, B200
LEAST = 99 << 10  # bytes that other GPUs from 2020 on have: compute capabilities 8.6, 8.9 and 12.0
LEAST_KEYS = 128  # widest keys with which the delta rule fits into LEAST


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; AMPLE off the GPU, where the interpreter runs.

    PyTorch keeps the properties of a device. Its compiler follows this function, and warns of one with a cache of its own.
    """
    if device.type != "cuda":
        return AMPLE
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", LEAST)


def why_unfit(device: torch.device, transition: Transition, key_width: int) -> str | None:
    """Why the kernels of a transition do not run on a GPU; None where they do."""
    if torch.version.hip is not None and transition.by_log:  # compiled for gfx942 alone, never run
        return None
    what, needed = transition.name, LEAST
    if not transition.by_log:  # its matrices are as large as keys are wide
        what, needed = f"{what} with keys of {key_width}", AMPLE if key_width > LEAST_KEYS else LEAST
    shared = shared_memory(device)
    if shared >= needed:
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} has {shared >> 10} KB of shared memory, the kernels of the {what} need {needed >> 10} KB"
