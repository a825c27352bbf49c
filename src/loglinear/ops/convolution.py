"""``loglinear::convolution``: the short convolution's kernels as autograd and PyTorch's compiler see them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from loglinear.ops import checks, fallback
from loglinear.ops.once import differentiable_once

MAX_TAPS = 7


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take these inputs: CUDA, at most 32 bits, at most 7 taps."""
    what, taps = "the short convolution", weight.shape[1]
    if checks.transforming() or not fallback.on_kernels(what, x):
        return False
    return taps <= MAX_TAPS or fallback.plain(what, f"{taps} taps, where the kernel takes up to {MAX_TAPS}")


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor | None) -> Tensor:
    """``silu(bias + Σ_j weight[:, W-1-j] · x_{t-j})`` ``[B, T, channels]`` by ``kernels.pointwise.convolution``."""
    op = convolution if torch.compiler.is_compiling() else Convolution.apply
    return op(x, weight, bias, place)


def _kernels() -> Any:
    """Imported on first use: importing loglinear imports no Triton."""
    return import_module("loglinear.kernels.pointwise.convolution")


@torch.library.custom_op("loglinear::convolution", mutates_args=())
def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor | None) -> Tensor:
    """Forward of the kernels."""
    return _kernels().forward(x, weight, bias, place)


@convolution.register_fake
def _(x, weight, bias, place):
    return x.new_empty(x.shape)


@torch.library.custom_op("loglinear::convolution_backward", mutates_args=())
def convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor | None
) -> list[Tensor]:
    """Gradients of x and weight, then of bias if there is one."""
    return [y for y in _kernels().backward(dy, x, weight, bias, place) if y is not None]


@convolution_backward.register_fake
def _(dy, x, weight, bias, place):
    return [y.new_empty(y.shape) for y in (x, weight, bias) if y is not None]


def _backward(ctx, dy):
    x, weight, bias, place = ctx.saved_tensors
    dx, dweight, *dbias = convolution_backward(dy, x, weight, bias, place)
    return dx, dweight, dbias[0] if dbias else None, None


convolution.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class Convolution(torch.autograd.Function):
    """The same kernels for eager calls: an operator would cost the host more than the kernel costs the GPU."""

    @staticmethod
    def forward(ctx, x, weight, bias, place):
        ctx.save_for_backward(x, weight, bias, place)
        return _kernels().forward(x, weight, bias, place)

    @staticmethod
    @differentiable_once
    def backward(ctx, dy):
        return *_kernels().backward(dy, *ctx.saved_tensors), None
