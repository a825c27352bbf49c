"""TILES of matrices ``[K, WIDTH]`` in memory, whose rows are STRIDE elements apart."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_part(base, first_k, first_n, WIDTH: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, BK: tl.constexpr,
              BN: tl.constexpr):  # fmt: skip
    """Tile ``[BK, BN]`` of a matrix ``[K, WIDTH]`` with rows of STRIDE elements."""
    rows = first_k + tl.arange(0, BK)
    columns = first_n + tl.arange(0, BN)
    pointers = base + (rows[:, None] * STRIDE + columns[None, :])
    if K % BK == 0 and WIDTH % BN == 0:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(rows < K)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def load_part_if(active, base, first_k, first_n, WIDTH: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr,
                 BK: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """``load_part`` if active, else zero."""
    rows = first_k + tl.arange(0, BK)
    columns = first_n + tl.arange(0, BN)
    pointers = base + (rows[:, None] * STRIDE + columns[None, :])
    limit = tl.where(active, WIDTH, 0)
    return tl.load(pointers, mask=(rows < K)[:, None] & (columns < limit)[None, :], other=0.0)


@triton.jit
def store_part(base, tile, first_k, first_n, WIDTH: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr,
               BK: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Write tile ``[BK, BN]`` of a matrix ``[K, WIDTH]`` with rows of STRIDE elements."""
    rows = first_k + tl.arange(0, BK)
    columns = first_n + tl.arange(0, BN)
    pointers = base + (rows[:, None] * STRIDE + columns[None, :])
    if K % BK == 0 and WIDTH % BN == 0:
        tl.store(pointers, tile.to(base.dtype.element_ty))
    else:
        tl.store(pointers, tile.to(base.dtype.element_ty), mask=(rows < K)[:, None] & (columns < WIDTH)[None, :])
