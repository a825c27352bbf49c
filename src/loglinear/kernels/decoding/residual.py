"""RESIDUAL: two operations between a decoder's matrix products, one launch each: a sum with its norm, and SwiGLU's gate."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.decoding.outputs import root_mean_square_norm, warps_for
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.problem import cdiv
from loglinear.kernels.tree.replay import replay

BLOCK, WARPS = 512, 4  # of the gate


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
    return replay(run_add_norm, [x, added, weight], eps)  # type: ignore[return-value]


def run_add_norm(inputs: list, eps: float) -> tuple[Tensor, Tensor]:
    """The launch of ``add_norm``."""
    x, _, weight = inputs
    width = weight.shape[0]
    total, normed = (launching.scratch(tuple(x.shape), x.dtype, x.device) for _ in range(2))
    if x.numel():
        block = triton.next_power_of_2(width)
        launching.launch(
            add_norm_kernel, x.numel() // width, *inputs, total, normed, eps, N=width, BLOCK=block,
            num_warps=warps_for(block),
        )  # fmt: skip
    return total, normed


@triton.jit(do_not_specialize=["count"])
def silu_times_kernel(gate, x, y, count, BLOCK: tl.constexpr):
    """Grid: blocks of numbers. float32: the gate and the product, each rounded as plain code rounds it."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    opening = tl.load(gate + places, mask=inside, other=0.0)
    wide = opening.to(tl.float32)
    opened = (wide * tl.sigmoid(wide)).to(opening.dtype).to(tl.float32)
    value = opened * tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + places, value.to(y.dtype.element_ty), mask=inside)


def silu_times(gate: Tensor, x: Tensor) -> Tensor:
    """``silu(gate) · x``, both contiguous, of one shape and dtype, at most 32 bits."""
    return replay(run_silu_times, [gate, x])[0]  # type: ignore[return-value]


def run_silu_times(inputs: list) -> tuple[Tensor]:
    """The launch of ``silu_times``."""
    gate, x = inputs
    y = launching.scratch(tuple(gate.shape), gate.dtype, gate.device)
    if gate.numel():
        launching.launch(
            silu_times_kernel, cdiv(gate.numel(), BLOCK), gate, x, y, gate.numel(), BLOCK=BLOCK, num_warps=WARPS
        )
    return (y,)
