"""PRODUCTS of a token, or a few, with a decoder's weights, and the operations between them. Calls without autograd only.

Such a call takes the time of reading the weights and of its launches. A layer has four launches beside the sequence mixing:
norms are made in the product behind them, sums with the residual stream and the gate of SwiGLU in the product before them.
``why_not`` decides for all of them. The plain layers define the result, which is rounded here less often.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loglinear import kernels
from loglinear.ops import fused

ENABLED = True  # the switch
MOST_ROWS = 4  # a token of 825M parameters, H200, bf16, 2026-11-30: 1.37 ms for 1.53 with 4 rows, 2.24 for 1.78 with 8
MOST_COLUMNS = 8192  # of weights: a program holds whole rows in registers
MULTIPLE = 8  # of columns: rows of 16-bit weights then begin at multiples of 16 bytes


def why_not(x: Tensor, *weights: Tensor) -> str | None:
    """Why the plain layers take products of x ``[..., K]`` with these weights; None where the kernels do.

    The widest weight counts: the inputs of later products in a layer are made by the kernels, like x in all but width.
    """
    if not ENABLED:
        return "switched off (ops.products.ENABLED)"
    if not fused.fits(x, *weights):
        return "gradients, a compiler, or tensors that are not contiguous and of one CUDA device"
    if torch.version.hip is not None:
        return "an AMD GPU, where the kernels have not been measured"
    if x.dtype not in (torch.bfloat16, torch.float16) or any(weight.dtype != x.dtype for weight in weights):
        return f"{x.dtype} inputs or weights of another dtype, where the kernels take 16 bits throughout"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast"
    if not 0 < x.numel() <= MOST_ROWS * x.shape[-1]:
        return f"{x.numel() // max(x.shape[-1], 1)} rows, where the kernels take 1 to {MOST_ROWS}"
    widths = {weight.shape[-1] for weight in weights}
    if max(widths) > MOST_COLUMNS or any(width % MULTIPLE for width in widths):
        return f"weights of {widths} columns, where the kernels take multiples of {MULTIPLE} up to {MOST_COLUMNS:,}"
    return None


def projected(
    x: Tensor,
    first: Tensor,
    second: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """``x @ firstᵀ`` and ``x @ secondᵀ``, x ``[..., K]``; with ``norm [K]`` of its RMS norm."""
    return kernels.matvec.products(x, first, second, norm, None, eps)


def summed(
    x: Tensor,
    weight: Tensor,
    added: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    position: Tensor | None = None,
) -> Tensor:
    """``added + x @ weightᵀ``, x ``[B, T, K]``; with ``norm [K]`` of its RMS norm.

    T is added to ``position``, int64 ``[B]``, which the launches before this one may read.
    """
    return kernels.matvec.products(x, weight, None, norm, added, eps, position=position)[0]


def swiglu(x: Tensor, gate: Tensor, up: Tensor, norm: Tensor, eps: float) -> Tensor:
    """``silu(y @ gateᵀ) · (y @ upᵀ)`` of y, the RMS norm of x with the weight ``norm``."""
    return kernels.matvec.products(x, gate, up, norm, None, eps, gated=True)[0]
