"""UNIT LENGTH: queries and keys of the delta rule over their lengths, both in one kernel each way.

Legend: a row is one head of one token, K wide, whole in registers: a backward pass makes its length again. float32: everything
inside.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.pointwise.functions import inverse_length
from loglinear.kernels.pointwise.rows import Tile, load_rows, rows_from, scratch_like, store_rows, with_strides
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import constants
from loglinear.kernels.tree.problem import cdiv, padded

NUMBERS = 2048  # of a tile


@triton.jit
def _unit(x, y, stride, at, S: tl.constexpr):
    value = load_rows(x, stride, at)
    store_rows(y, value * inverse_length(value, 1)[:, None], at, S)


@triton.jit
def _unit_grad(dy, x, dx, stride_dy, stride, at, S: tl.constexpr):
    value = load_rows(x, stride, at)
    gradient = load_rows(dy, stride_dy, at)
    inverse = inverse_length(value, 1)[:, None]
    value *= inverse
    store_rows(dx, inverse * (gradient - value * tl.sum(value * gradient, 1)[:, None]), at, S)


@triton.jit(do_not_specialize=["rows"])
def unit_kernel(q, k, stride_q, stride_k, unit_q, unit_k, rows, S: tl.constexpr):
    """unit_q and unit_k ``[rows, K]``. Grid: blocks of rows."""
    at = rows_from(tl.program_id(0) * S.ROWS, rows, S)
    _unit(q, unit_q, stride_q, at, S)
    _unit(k, unit_k, stride_k, at, S)


@triton.jit(do_not_specialize=["rows"])
def unit_grads_kernel(dunit_q, dunit_k, q, k, stride_dq, stride_dk, stride_q, stride_k, dq, dk, rows, S: tl.constexpr):
    """dq and dk ``[rows, K]``. Grid: blocks of rows."""
    at = rows_from(tl.program_id(0) * S.ROWS, rows, S)
    _unit_grad(dunit_q, q, dq, stride_dq, stride_q, at, S)
    _unit_grad(dunit_k, k, dk, stride_dk, stride_k, at, S)


def _launch(kernel, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Two results like the last two inputs, all ``[B, T, G, K]``."""
    q, k = inputs[-2:]
    groups, width = q.shape[2:]
    results = scratch_like(q), scratch_like(k)
    columns, rows = padded(width), q.numel() // width
    block, warps = max(NUMBERS // columns, 1), min(max(columns // 256, 4), 16)
    S = constants(Tile, block, columns, groups, width)
    if rows:
        launching.launch(kernel, cdiv(rows, block), *with_strides(*inputs), *results, rows, S=S, num_warps=warps)
    return results


def forward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """``x / sqrt(Σ x² + 1e-6)`` of both ``[B, T, G, K]``, contiguous, in their dtypes of at most 32 bits."""
    return _launch(unit_kernel, q, k)


def backward(dunit_q: Tensor, dunit_k: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of q and k."""
    return _launch(unit_grads_kernel, dunit_q, dunit_k, q, k)
