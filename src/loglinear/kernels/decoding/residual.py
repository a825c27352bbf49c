"""RESIDUAL: the sum and the norm between a decoder's matrix products, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.decoding.outputs import root_mean_square_norm, warps_for
from loglinear.kernels.pointwise.rows import scratch_like
from loglinear.kernels.tree import launching


@triton.jit
def add_norm_kernel(x, added, weight, total, normed, eps, N: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: rows of N columns. float32: the norm of the sum as it is rounded."""
    row = tl.program_id(0).to(tl.int64) * N
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    one = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(added + row + columns, mask=inside, other=0.0).to(tl.float32)
    rounded = (one + other).to(total.dtype.element_ty)
    tl.store(total + row + columns, rounded, mask=inside)
    out = root_mean_square_norm(rounded.to(tl.float32), weight, columns, inside, eps, N)
    tl.store(normed + row + columns, out.to(normed.dtype.element_ty), mask=inside)


def add_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + added`` and its RMS norm, both of the shape and dtype of x: ``[..., N]``, contiguous, at most 32 bits."""
    return launching.replay(run_add_norm, [x, added, weight], eps)


def run_add_norm(inputs: list, eps: float) -> tuple[Tensor, Tensor]:
    """The launch of ``add_norm``."""
    x, _, weight = inputs
    width = weight.shape[0]
    total, normed = scratch_like(x), scratch_like(x)
    if x.numel():
        block = triton.next_power_of_2(width)
        sizes = dict(N=width, BLOCK=block, num_warps=warps_for(block))
        launching.launch(add_norm_kernel, x.numel() // width, *inputs, total, normed, eps, **sizes)
    return total, normed
