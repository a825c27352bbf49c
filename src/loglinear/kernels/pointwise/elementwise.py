"""ELEMENTWISE: the gradients of a SwiGLU gate, and a sum of two gradients that autocast has rounded. float32 inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.decoding.residual import silu_times
from loglinear.kernels.pointwise.functions import silu_slope
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.problem import cdiv

BLOCK = 1024  # numbers of a program: 8 for each thread of 4 warps, one load of 16 bits


@triton.jit(do_not_specialize=["size"])
def silu_product_grads_kernel(dout, gate, x, dgate, dx, size, BLOCK: tl.constexpr):
    """dgate and dx ``[size]``. Grid: blocks."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.load(dout + place, mask=place < size, other=0.0).to(tl.float32)
    z = tl.load(gate + place, mask=place < size, other=0.0).to(tl.float32)
    value = tl.load(x + place, mask=place < size, other=0.0).to(tl.float32)
    opening = tl.sigmoid(z)
    dz = gradient * value * silu_slope(z, opening)
    tl.store(dgate + place, dz.to(dgate.dtype.element_ty), mask=place < size)
    tl.store(dx + place, (gradient * z * opening).to(dx.dtype.element_ty), mask=place < size)


@triton.jit(do_not_specialize=["size"])
def sum_kernel(a, b, total, size, BLOCK: tl.constexpr):
    """total ``[size]``, float32. Grid: blocks."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(a + place, mask=place < size, other=0.0).to(tl.float32)
    second = tl.load(b + place, mask=place < size, other=0.0).to(tl.float32)
    tl.store(total + place, first + second, mask=place < size)


def silu_product(gate: Tensor, x: Tensor) -> Tensor:
    """``silu(gate) · x``, contiguous; both of one shape and one dtype of at most 32 bits. The kernel of a decoding step."""
    return silu_times(gate.contiguous(), x.contiguous())


def silu_product_backward(dout: Tensor, gate: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and x."""
    dout, gate, x = dout.contiguous(), gate.contiguous(), x.contiguous()
    dgate, dx = (launching.scratch(tuple(x.shape), x.dtype, x.device) for _ in range(2))
    if x.numel():
        launching.launch(
            silu_product_grads_kernel, cdiv(x.numel(), BLOCK), dout, gate, x, dgate, dx, x.numel(),
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return dgate, dx


def wide_sum(a: Tensor, b: Tensor) -> Tensor:
    """``a + b`` of one shape, in float32, contiguous."""
    a, b = a.contiguous(), b.contiguous()
    total = launching.scratch(tuple(a.shape), torch.float32, a.device)
    if a.numel():
        launching.launch(sum_kernel, cdiv(a.numel(), BLOCK), a, b, total, a.numel(), BLOCK=BLOCK, num_warps=4)
    return total
