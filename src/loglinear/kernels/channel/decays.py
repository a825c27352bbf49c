"""DECAYS of channels inside a chunk, level by level of its tree. Logs are float32 in base 2.

Two tokens of neighbouring blocks of b tokens meet at the boundary: the decay between them is that of the key to the end of its
block, times that of the query from the start of its own. Both logs are sums of gates, so no difference is taken, and no factor
exceeds 1. Blocks of 1, 2, 4, … tokens give all pairs of a chunk: those of level 1, 2, 3, ….
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import GATE_FLOOR, LOG2_E


@triton.jit
def load_columns(base, stride, here, first, S: tl.constexpr):
    """Columns ``[C, BK]`` from ``first`` on of the tokens of a chunk, of K; 0 past the end."""
    columns = first + tl.arange(0, S.BK)
    pointers = base + here.origin * stride + (tl.arange(0, S.C)[:, None] * stride + columns[None, :])
    return tl.load(pointers, mask=here.valid[:, None] & (columns < S.K)[None, :], other=0.0)


@triton.jit
def store_columns(base, stride, here, tile, first, S: tl.constexpr):
    """Write what ``load_columns`` reads."""
    columns = first + tl.arange(0, S.BK)
    pointers = base + here.origin * stride + (tl.arange(0, S.C)[:, None] * stride + columns[None, :])
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=here.valid[:, None] & (columns < S.K)[None, :])


@triton.jit
def load_gates(x, here, h, first, S: tl.constexpr):
    """Log2-decays ``[C, BK]`` of head h, clamped; NaN for NaN and for an infinite growth."""
    raw = load_columns(x.g + h * S.K, x.stride_g, here, first, S).to(tl.float32)
    return tl.where(raw < float("inf"), tl.maximum(raw, GATE_FLOOR), float("nan")) * LOG2_E


@triton.jit
def in_odd_block(level: tl.constexpr, C: tl.constexpr):
    """Which tokens ``[C, 1]`` are in an odd block of 2^level tokens: they are the queries of the level, the others its keys."""
    return ((tl.arange(0, C) >> level) & 1 == 1)[:, None]


@triton.jit
def meet(level: tl.constexpr, C: tl.constexpr):
    """Pairs ``[C, C]`` of tokens in two neighbouring blocks of 2^level tokens, in either order: level is their highest
    differing bit."""
    t = tl.arange(0, C)
    return (t[:, None] ^ t[None, :]) >> level == 1


@triton.jit
def next_level(since, until, totals, level: tl.constexpr, S: tl.constexpr):
    """The logs from the start of a token's block to the token and from the token to the end of its block, ``[C, BK]`` each, and
    the totals of blocks ``[C / block, BK]``: from blocks of 2^level tokens to blocks twice as long."""
    BLOCKS: tl.constexpr = S.C >> (level + 1)
    early, late = tl.split(tl.permute(tl.reshape(totals, [BLOCKS, 2, S.BK]), (0, 2, 1)))
    other = tl.permute(tl.join(late, early), (0, 2, 1))[:, :, None, :]
    other = tl.reshape(tl.broadcast_to(other, [BLOCKS, 2, 1 << level, S.BK]), [S.C, S.BK])
    odd = in_odd_block(level, S.C)
    return since + tl.where(odd, other, 0.0), until + tl.where(odd, 0.0, other), early + late


@triton.jit
def load_log(logs, unit, first, S: tl.constexpr):
    """Log-decay ``[BK]`` of a unit (int64) of ``logs [units, K]``."""
    columns = first + tl.arange(0, S.BK)
    return tl.load(logs + unit * S.K + columns, mask=columns < S.K, other=0.0)


@triton.jit
def store_log(logs, unit, value, first, S: tl.constexpr):
    """Write what ``load_log`` reads."""
    columns = first + tl.arange(0, S.BK)
    tl.store(logs + unit * S.K + columns, value, mask=columns < S.K)
