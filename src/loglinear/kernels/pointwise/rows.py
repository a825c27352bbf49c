"""ROWS: a token has some rows of one width side by side, and a program takes tiles of rows, whole or by some columns.

Norms and lengths see whole rows of any token; gates see the rows of one head. Results are contiguous.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loglinear.kernels.tree import launching
from loglinear.kernels.tree.bundles import hash_of
from loglinear.kernels.tree.problem import token_rows


class Tile(NamedTuple):
    """Sizes of a launch: a program takes tiles ``[ROWS, COLUMNS]``. HEADS: rows of a token; WIDTH: numbers of a row."""

    ROWS: Any
    COLUMNS: Any
    HEADS: Any = 1
    WIDTH: Any = 0
    __hash__ = hash_of


class Rows(NamedTuple):
    """A tile of rows: their numbers, the columns, their tokens (int64), the places of their numbers in a token, and which rows
    and which numbers there are.
    """

    row: Any
    columns: Any
    tokens: Any
    inner: Any
    valid: Any
    inside: Any


@triton.jit
def rows_from(first, rows, S: tl.constexpr, PART: tl.constexpr = 0):
    """The tile of rows from ``first`` on, of ``rows`` in all; of wide rows the columns of one part."""
    row = first + tl.arange(0, S.ROWS)
    columns = PART * S.COLUMNS + tl.arange(0, S.COLUMNS)
    inside = (row < rows)[:, None] & (columns < S.WIDTH)[None, :]
    tokens = (row // S.HEADS).to(tl.int64)[:, None]
    return Rows(row, columns, tokens, (row % S.HEADS)[:, None] * S.WIDTH + columns[None, :], row < rows, inside)


@triton.jit
def load_rows(x, stride, at):
    return tl.load(x + at.tokens * stride + at.inner, mask=at.inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(y, value, at, S: tl.constexpr):
    """Write a tile of rows to y ``[rows, WIDTH]``."""
    pointers = y + at.row.to(tl.int64)[:, None] * S.WIDTH + at.columns[None, :]
    tl.store(pointers, value.to(y.dtype.element_ty), mask=at.inside)


def with_strides(*tensors: Tensor | None) -> list:
    """The tensors as ``token_rows`` lays them out, then the distance of two tokens of each; None where absent."""
    rows = [None if x is None else token_rows(x) for x in tensors]
    return rows + [None if x is None else x.stride(1) for x in rows]  # type: ignore[operator]


def registers(most: int) -> dict:
    """The launch option that caps the registers of a thread, where GPUs have one."""
    return {} if torch.version.hip is not None else {"maxnreg": most}


def scratch_like(x: Tensor | None, dtype: torch.dtype | None = None) -> Any:
    """Contiguous scratch of the shape of x, in its dtype or another; None for None."""
    return None if x is None else launching.scratch(tuple(x.shape), dtype or x.dtype, x.device)
