"""LEVEL SCALES: λ of every level from its projection. One kernel each way.

Only the inputs are saved for backward. Legend: rows are the tokens of all sequences, one behind the other; a row has a number
for every level of every head. float32: everything inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.pointwise.functions import sigmoid, softplus
from loglinear.kernels.pointwise.rows import Tile, scratch_like, with_strides
from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import constants
from loglinear.kernels.tree.problem import cdiv, token_rows

TOKENS, COLUMNS, WARPS = 16, 128, 2  # of a tile
PROGRAMS = 1024  # of the backward pass, about


@triton.jit
def _scale_columns(L, width, S: tl.constexpr):
    """(part of the rows of a program, columns, their L ``[1, COLUMNS]``). Grid: parts of the rows x blocks of columns."""
    blocks = tl.cdiv(width, S.COLUMNS)
    columns = (tl.program_id(0) % blocks) * S.COLUMNS + tl.arange(0, S.COLUMNS)
    factor = tl.load(L + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    return tl.program_id(0) // blocks, columns, factor


@triton.jit(do_not_specialize=["rows"])
def level_scales_kernel(dl, L, scales, stride, rows, width, S: tl.constexpr, OFFSET: tl.constexpr):
    """``scales [rows, width] = softplus(L · dl + OFFSET)``."""
    part, columns, factor = _scale_columns(L, width, S)
    tokens = part.to(tl.int64) * S.ROWS + tl.arange(0, S.ROWS)
    mask = (tokens < rows)[:, None] & (columns < width)[None, :]
    product = factor * tl.load(dl + tokens[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    pointers = scales + tokens[:, None] * width + columns[None, :]
    tl.store(pointers, softplus(product + OFFSET).to(scales.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tiles"])
def level_scales_grads_kernel(
    dscales,
    dl,
    stride_dscales,
    stride,
    L,
    ddl,
    partial,
    stride_ddl,
    rows,
    width,
    tiles,
    S: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """ddl ``[rows, width]``, and the sums of dL over ``tiles`` blocks of rows, ``partial [programs, width]``."""
    part, columns, factor = _scale_columns(L, width, S)
    sums = tl.zeros([S.ROWS, S.COLUMNS], tl.float32)
    for i in range(tiles):
        tokens = (part * tiles + i).to(tl.int64) * S.ROWS + tl.arange(0, S.ROWS)
        mask = (tokens < rows)[:, None] & (columns < width)[None, :]
        x = tl.load(dl + tokens[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        pointers = dscales + tokens[:, None] * stride_dscales + columns[None, :]
        gradient = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) * sigmoid(factor * x + OFFSET)
        sums += gradient * x
        pointers = ddl + tokens[:, None] * stride_ddl + columns[None, :]
        tl.store(pointers, (gradient * factor).to(ddl.dtype.element_ty), mask=mask)
    tl.store(partial + part.to(tl.int64) * width + columns, tl.sum(sums, 0), mask=columns < width)


def forward(dl: Tensor, L: Tensor, offset: float) -> Tensor:
    """λ ``[B, T, H, levels]``, contiguous, in the dtype of dl ``[B, T, H · levels]``; L ``[H, levels]``."""
    dl = token_rows(dl)
    batch, length, width = dl.shape
    scales = launching.scratch((batch, length, *L.shape), dl.dtype, dl.device)
    if programs := cdiv(batch * length, TOKENS) * cdiv(width, COLUMNS):
        sizes = dict(S=constants(Tile, TOKENS, COLUMNS), OFFSET=offset, num_warps=WARPS)
        given = dl, L.contiguous(), scales, dl.stride(1), batch * length, width
        launching.launch(level_scales_kernel, programs, *given, **sizes)
    return scales


def backward(
    dscales: Tensor, dl: Tensor, L: Tensor, offset: float, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of dl (in ``into``, if given) and L, in their dtypes; else as ``forward``. The same bits every run."""
    (batch, length, width), ddl = dl.shape, scratch_like(dl) if into is None else into
    tiles = max(cdiv(blocks := cdiv(batch * length, TOKENS), PROGRAMS), 1)
    parts = cdiv(blocks, tiles)
    partial = launching.scratch((parts, width), torch.float32, dl.device)
    if parts * width:
        sizes = dict(S=constants(Tile, TOKENS, COLUMNS), OFFSET=offset, num_warps=WARPS)
        given = *with_strides(dscales, dl), L.contiguous(), ddl, partial, ddl.stride(1), batch * length, width, tiles
        launching.launch(level_scales_grads_kernel, parts * cdiv(width, COLUMNS), *given, **sizes)
    return ddl, partial.sum(0).view(L.shape).to(L.dtype)
