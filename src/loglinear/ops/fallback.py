"""FALLBACK: plain PyTorch where a GPU might have run a kernel. It is many times slower, so each reason is said once."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from loglinear import kernels

said: set[str] = set()


def plain(what: str, reason: str) -> Literal[False]:
    """False, for a ``has_kernel`` to return. Warns the first time that ``what`` has no kernel for this reason."""
    if not torch.compiler.is_compiling():
        warn_once(f"{what} runs in plain PyTorch on the GPU, not in a kernel: {reason}")
    return False


def warn_once(message: str, once: str | None = None) -> None:
    """A UserWarning, once in a process for each ``once`` (None: each message)."""
    key = message if once is None else once
    if key not in said:
        said.add(key)
        warnings.warn(message, UserWarning, stacklevel=4)


def on_kernels(what: str, x: Tensor) -> bool:
    """Whether kernels take tensors like x at all: on CUDA, at most 32 bits, with Triton installed."""
    if not x.is_cuda:
        return False
    if x.dtype == torch.float64:
        return plain(what, "float64 inputs, where kernels take float32, bfloat16 and float16")
    return kernels.installed() or plain(what, "Triton is not installed (pip install triton)")
