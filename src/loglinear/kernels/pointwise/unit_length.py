"""UNIT LENGTH: queries and keys of the delta rule over their lengths, both in one kernel each way.

Legend: a row is one head of one token, K wide, whole in registers: a backward pass makes its length again. float32: everything
inside.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.pointwise.functions import inverse_length
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.problem import cdiv, padded, token_rows

NUMBERS = 2048  # of a tile


@triton.jit
def _rows(x, stride, row, columns, inside, G: tl.constexpr, K: tl.constexpr):
    pointers = x + (row // G).to(tl.int64)[:, None] * stride + ((row % G)[:, None] * K + columns[None, :])
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _unit(x, y, stride, row, columns, inside, G: tl.constexpr, K: tl.constexpr):
    value = _rows(x, stride, row, columns, inside, G, K)
    value *= inverse_length(value, 1)[:, None]
    tl.store(y + row.to(tl.int64)[:, None] * K + columns[None, :], value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _unit_grad(dy, x, dx, stride_dy, stride, row, columns, inside, G: tl.constexpr, K: tl.constexpr):
    value = _rows(x, stride, row, columns, inside, G, K)
    gradient = _rows(dy, stride_dy, row, columns, inside, G, K)
    inverse = inverse_length(value, 1)[:, None]
    value *= inverse
    gradient = inverse * (gradient - value * tl.sum(value * gradient, 1)[:, None])
    tl.store(dx + row.to(tl.int64)[:, None] * K + columns[None, :], gradient.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def unit_kernel(
    q, k, unit_q, unit_k, stride_q, stride_k, rows,
    G: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """unit_q and unit_k ``[rows, K]``. Grid: blocks of rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (columns < K)[None, :]
    _unit(q, unit_q, stride_q, row, columns, inside, G, K)
    _unit(k, unit_k, stride_k, row, columns, inside, G, K)


@triton.jit(do_not_specialize=["rows"])
def unit_grads_kernel(
    dunit_q, dunit_k, q, k, dq, dk, stride_dq, stride_dk, stride_q, stride_k, rows,
    G: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dq and dk ``[rows, K]``. Grid: blocks of rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (columns < K)[None, :]
    _unit_grad(dunit_q, q, dq, stride_dq, stride_q, row, columns, inside, G, K)
    _unit_grad(dunit_k, k, dk, stride_dk, stride_k, row, columns, inside, G, K)


def _launch(kernel, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Two results like the last two inputs, all ``[B, T, G, K]``."""
    inputs = [token_rows(x) for x in inputs]
    q = inputs[-1]
    _, _, groups, width = q.shape
    results = tuple(launching.scratch(tuple(x.shape), x.dtype, x.device) for x in inputs[-2:])
    columns = padded(width)
    block, rows = max(NUMBERS // columns, 1), q.numel() // width
    if rows:
        launching.launch(
            kernel, cdiv(rows, block), *inputs, *results, *(x.stride(1) for x in inputs), rows,
            G=groups, K=width, ROWS=block, COLUMNS=columns, num_warps=min(max(columns // 256, 4), 16),
        )  # fmt: skip
    return results[0], results[1]


def forward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """``x / sqrt(Σ x² + 1e-6)`` of both ``[B, T, G, K]``, contiguous, in their dtypes of at most 32 bits."""
    return _launch(unit_kernel, [q, k])


def backward(dunit_q: Tensor, dunit_k: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of q and k."""
    return _launch(unit_grads_kernel, [dunit_q, dunit_k, q, k])
