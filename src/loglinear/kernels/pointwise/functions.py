"""FUNCTIONS of one number or one row that several kernels take: softplus, the slope of SiLU, a row's inverse length."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """``log(1 + e^x)``, in float32, exact to float32 on either side of zero.

    ``log(1 + e) = 2 artanh(s)`` with ``s = e / (2 + e) <= 1/3``: the ninth term of the series is below 2^-28 of the sum.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    square = s * s
    series = 1.0 / 15
    for i in tl.static_range(7):
        series = series * square + 1.0 / (13 - 2 * i)
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def sigmoid(x):
    """``1 / (1 + e^-x)`` in float32, to 3e-7: five instructions, where a division takes twelve."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def silu_slope(x, opening):
    """Derivative of ``x · opening``, where ``opening`` is the sigmoid of x."""
    return opening * (1 + x * (1 - opening))


@triton.jit
def gate_of(z, opening, SILU: tl.constexpr):
    """The output gate of z, where ``opening`` is the sigmoid of z: SiLU, or the sigmoid."""
    gate = opening
    if SILU:
        gate = z * opening
    return gate


@triton.jit
def gate_slope(z, opening, SILU: tl.constexpr):
    """Its derivative."""
    slope = opening * (1 - opening)
    if SILU:
        slope = silu_slope(z, opening)
    return slope


@triton.jit
def inverse_length(rows, axis: tl.constexpr):
    """``1 / sqrt(Σ x² + 1e-6)`` along an axis: the factor of queries and keys of the delta rule."""
    return tl.rsqrt(tl.sum(rows * rows, axis=axis) + 1e-6)
