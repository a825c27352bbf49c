"""FUSED: the operations beside the recurrence and the matrix products, one kernel each, for calls without autograd.

The number of launches decides the time of a decoding step of one row. If ``fits`` is false, layers run their plain code,
which is the definition. Both round at the same places, except in sums of the convolution's taps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loglinear import kernels
from loglinear.ops import dispatch, pointwise
from loglinear.ops.dispatch import MAX_KEY_WIDTH, MAX_VALUE_WIDTH

MAX_WIDTH = 16_384  # of a norm: one program holds it


class Columns(NamedTuple):
    """The columns of a mixer's projection.

    conv, rate, beta: first columns of the convolution's inputs, of the time steps and of β (-1: none, or made elsewhere).
    scaled: how many of the convolution's outputs, from the first on, are v that the time step must still multiply.
    """

    conv: int
    rate: int = -1
    beta: int = -1
    scaled: int = 0


def fits(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take x: contiguous on CUDA beside ``others``, at most 32 bits, no gradients, no compiler."""
    if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return pointwise.has_kernels(x, *others) and all(y.is_contiguous() for y in (x, *others))


def fits_linear(state: Tensor) -> bool:
    """Whether the linear models' step takes a state ``[rows, H, K, V]``: float32, each row contiguous, heads of a kernel's
    widths.
    """
    narrow = state.shape[2] <= MAX_KEY_WIDTH and state.shape[3] <= MAX_VALUE_WIDTH
    return narrow and state.dtype == torch.float32 and state[:1].is_contiguous()


def add_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """``x + added`` and its RMS norm, of the shape of x; None where the kernel does not take them."""
    alike = x.shape == added.shape and x.dtype == added.dtype == weight.dtype
    if not alike or not fits(x, added, weight):
        return None
    if weight.shape[0] > MAX_WIDTH:
        dispatch.plain(
            "a sum and its norm", f"rows of {weight.shape[0]:,} numbers, where the kernel takes {MAX_WIDTH:,}"
        )
        return None
    return kernels.decoding.residual.add_norm(x, added, weight, eps)


def silu_times(gate: Tensor, x: Tensor) -> Tensor:
    """``silu(gate) · x``."""
    if gate.shape == x.shape and gate.dtype == x.dtype and fits(gate, x):
        return kernels.decoding.silu_times(gate, x)
    return pointwise.silu_product(gate, x)


def step_inputs(*args) -> tuple[Tensor | None, ...]:
    """See ``kernels.decoding.inputs``."""
    return kernels.decoding.inputs.step_inputs(*args)


def step_outputs(*args) -> Tensor:
    """See ``kernels.decoding.outputs``."""
    return kernels.decoding.outputs.step_outputs(*args)


def gated_step(*args, gate: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """See ``step`` of ``kernels.decoding``. The layers' own inputs are not checked once more."""
    return kernels.decoding.step(*args, gate=gate)


def linear_step(*args) -> Tensor:
    """See ``kernels.decoding.linear_step``."""
    return kernels.decoding.linear_step.linear_step(*args)
