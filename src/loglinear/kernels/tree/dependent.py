"""DEPENDENT launches: a kernel may start before the one before it has ended, and waits for it where it needs its results.

This is programmatic dependent launch, of NVIDIA GPUs from Hopper on. Elsewhere kernels start one after the other.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents as launch_dependents
from triton.language.extra.cuda import gdc_wait as wait

__all__ = ["dependent", "launch_dependents", "wait"]

CAPABILITY = 9  # the first that has it


@lru_cache(maxsize=64)
def dependent(device: torch.device) -> bool:
    """Whether launches on this device can be dependent ones."""
    if device.type != "cuda" or torch.version.hip is not None or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device)[0] >= CAPABILITY
