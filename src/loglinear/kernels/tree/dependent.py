"""DEPENDENT launches: a kernel may start before the one before it has ended, and waits for it where it needs its results.

This is programmatic dependent launch, of NVIDIA GPUs from Hopper on. Elsewhere kernels start one after the other. The launch
of a kernel that starts early has ``launch_pdl=True``. Each of its programs must wait, for the launch after it relies on both.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

CAPABILITY = 9  # the first that has it


@triton.jit
def launch_dependents():
    """Let the next launch begin once all programs have called this or ended. (Triton's own, of 3.4, does not compile.)"""
    tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], tl.int32, is_pure=False, pack=1)


@triton.jit
def wait():
    """Wait until the launches before this one have ended."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], tl.int32, is_pure=False, pack=1)


@lru_cache(maxsize=64)
def dependent(device: torch.device) -> bool:
    """Whether launches on this device can be dependent ones."""
    if device.type != "cuda" or torch.version.hip is not None or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device)[0] >= CAPABILITY


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """The constant EARLY of a kernel, whether its programs wait, and the option of its launch."""
    return {"EARLY": True, "launch_pdl": True} if dependent(device) else {"EARLY": False}
