"""ELEMENTWISE: the gate of SwiGLU and its gradients, and a sum of two gradients that autocast has rounded. float32 inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.pointwise.functions import silu_slope
from loglinear.kernels.pointwise.rows import scratch_like
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.problem import cdiv

STEP_BLOCK = 512  # numbers of a program of the gate, which a decoding step takes too
BLOCK = 1024  # of the others: 8 for each thread of 4 warps, one load of 16 bits


@triton.jit(do_not_specialize=["count"])
def silu_times_kernel(gate, x, y, count, BLOCK: tl.constexpr):
    """y ``[count]``; the gate and the product are each rounded as plain code rounds it. Grid: blocks."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    opening = tl.load(gate + places, mask=inside, other=0.0)
    wide = opening.to(tl.float32)
    opened = (wide * tl.sigmoid(wide)).to(opening.dtype).to(tl.float32)
    value = opened * tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + places, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def silu_product_grads_kernel(dout, gate, x, dgate, dx, count, BLOCK: tl.constexpr):
    """dgate and dx ``[count]``. Grid: blocks."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.load(dout + place, mask=place < count, other=0.0).to(tl.float32)
    z = tl.load(gate + place, mask=place < count, other=0.0).to(tl.float32)
    value = tl.load(x + place, mask=place < count, other=0.0).to(tl.float32)
    opening = tl.sigmoid(z)
    dz = gradient * value * silu_slope(z, opening)
    tl.store(dgate + place, dz.to(dgate.dtype.element_ty), mask=place < count)
    tl.store(dx + place, (gradient * z * opening).to(dx.dtype.element_ty), mask=place < count)


@triton.jit(do_not_specialize=["count"])
def sum_kernel(a, b, total, count, BLOCK: tl.constexpr):
    """total ``[count]``, float32. Grid: blocks."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(a + place, mask=place < count, other=0.0).to(tl.float32)
    second = tl.load(b + place, mask=place < count, other=0.0).to(tl.float32)
    tl.store(total + place, first + second, mask=place < count)


def _launch(kernel, block: int, *tensors: Tensor) -> None:
    """A kernel of contiguous tensors of one size."""
    count = tensors[0].numel()
    if count:
        launching.launch(kernel, cdiv(count, block), *tensors, count, BLOCK=block, num_warps=4)


def silu_times(gate: Tensor, x: Tensor) -> Tensor:
    """``silu(gate) · x``, both contiguous, of one shape and dtype, at most 32 bits."""
    return launching.replay(run_silu_times, [gate, x])[0]


def run_silu_times(inputs: list) -> tuple[Tensor]:
    """The launch of ``silu_times``."""
    y = scratch_like(inputs[0])
    _launch(silu_times_kernel, STEP_BLOCK, *inputs, y)
    return (y,)


def silu_product(gate: Tensor, x: Tensor) -> Tensor:
    """``silu_times`` of any memory."""
    return silu_times(gate.contiguous(), x.contiguous())


def silu_product_backward(dout: Tensor, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and x."""
    dgate, dx = scratch_like(x), scratch_like(x)
    _launch(silu_product_grads_kernel, BLOCK, dout.contiguous(), gate.contiguous(), x.contiguous(), dgate, dx)
    return dgate, dx


def wide_sum(a: Tensor, b: Tensor) -> Tensor:
    """``a + b`` of one shape, in float32, contiguous."""
    total = scratch_like(a, torch.float32)
    _launch(sum_kernel, BLOCK, a.contiguous(), b.contiguous(), total)
    return total
