"""DECAYS of channels inside a chunk, level by level of its tree. Logs are float32 in base 2.

Two tokens of neighbouring blocks meet at the boundary between them. Their decay is that of the key to its block's end, times
that of the query from the start of its own. Neither factor exceeds 1. Blocks of 1, 2, 4, … tokens give all pairs of a chunk:
those of level 1, 2, 3, …. A log is a difference of two running sums inside the chunk; float32 inputs keep these as
pairs (value, rounding error), as tree/decays.py does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import GATE_FLOOR, LOG2_E, at_most_zero
from loglinear.kernels.tree.levels import SUB
from loglinear.kernels.tree.place import chunk_of, locate
from loglinear.kernels.tree.tiles import load_tile, store_tile


@triton.jit
def load_columns(base, stride, here, first, S: tl.constexpr):
    """Columns ``[C, BK]`` from ``first`` on of the tokens of a chunk, of K; 0 past the end."""
    return load_tile(base + here.origin * stride, stride, here.valid, S.C, S.K, S.BK, first)


@triton.jit
def store_columns(base, stride, here, tile, first, S: tl.constexpr):
    """Write what ``load_columns`` reads."""
    store_tile(base + here.origin * stride, stride, here.valid, tile, S.C, S.K, S.BK, first)


@triton.jit
def tokens_in(SIDE: tl.constexpr, C: tl.constexpr):
    """The places of a chunk's tokens: in blocks of SIDE, ``[C / SIDE, SIDE]``, if this is SUB, else ``[C]``.

    The pairs of the lower levels lie in small blocks. Their products and masks are the smaller for it, and a warp can have a
    block to itself.
    """
    if SIDE == SUB:
        t = tl.arange(0, C // SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    else:
        t = tl.arange(0, C)
    return t


@triton.jit
def load_rows(base, stride, here, t, first, S: tl.constexpr):
    """Columns ``[..., BK]`` from ``first`` on of the tokens at places ``t [...]`` of a chunk, of K; 0 past the end."""
    rows, columns = tl.expand_dims(t, -1), first + tl.arange(0, S.BK)
    pointers = base + here.origin * stride + (rows * stride + columns)
    return tl.load(pointers, mask=(rows < here.size) & (columns < S.K), other=0.0)


@triton.jit
def turned(x):
    """The transpose of a matrix or of each of several."""
    return tl.trans(x) if len(x.shape) == 2 else tl.permute(x, (0, 2, 1))


@triton.jit
def in_odd_block(level, t):
    """Which tokens ``[..., 1]`` are in an odd block of 2^level tokens: the queries of the level. The others are its keys."""
    return tl.expand_dims((t >> level) & 1 == 1, -1)


@triton.jit
def rows_and_columns(t):
    """The places of both tokens of all pairs: ``[..., SIDE, 1]`` and ``[..., 1, SIDE]``."""
    return tl.expand_dims(t, -1), tl.expand_dims(t, -2)


@triton.jit
def meet(level, t):
    """Pairs ``[..., SIDE, SIDE]`` of tokens in two neighbouring blocks of 2^level tokens, in either order: level is their
    highest differing bit."""
    row, column = rows_and_columns(t)
    return (row ^ column) >> level == 1


@triton.jit
def load_sums(sums, here, h, t, plane, first, S: tl.constexpr):
    """Running sums ``[..., BK]`` at places ``t [...]`` of a chunk, or at its last token: (value, its rounding error or 0)."""
    columns = first + tl.arange(0, S.BK)
    rows = tl.expand_dims(tl.minimum(t, tl.minimum(here.size, S.C) - 1), -1)
    pointers = sums + (here.origin * S.H + h) * S.K + (rows * (S.H * S.K) + columns)
    inside = (columns < S.K) & (rows >= 0)
    high = tl.load(pointers, mask=inside, other=0.0)
    if S.EXACT:
        low = tl.load(pointers + plane, mask=inside, other=0.0)
    else:
        low = tl.zeros_like(high)
    return high, low


@triton.jit
def to_boundary(sums, here, h, t, high, low, plane, first, level, S: tl.constexpr):
    """Decay ``[..., BK]`` between each token at ``t [...]`` and the boundary at which it meets its partners of a level."""
    end_high, end_low = load_sums(sums, here, h, (((t >> level) | 1) << level) - 1, plane, first, S)
    odd = in_odd_block(level, t)
    log = tl.where(odd, high - end_high, end_high - high)
    if S.EXACT:
        log += tl.where(odd, low - end_low, end_low - low)
    return tl.exp2(at_most_zero(log))


@triton.jit
def chunk_decays(sums, here, h, high, low, plane, first, S: tl.constexpr):
    """Decays ``[C, BK]`` of each token from the start of its chunk, and to the end; the log-decay of the chunk ``[1, BK]``."""
    end_high, end_low = load_sums(sums, here, h, tl.arange(0, 1) + S.C, plane, first, S)
    log = end_high - high
    if S.EXACT:
        log += end_low - low
    return tl.exp2(high), tl.exp2(at_most_zero(log)), end_high


@triton.jit
def load_log(logs, site, first, S: tl.constexpr):
    """Log-decay ``[BK]`` of a site (int64) of ``logs [sites, K]``."""
    columns = first + tl.arange(0, S.BK)
    return tl.load(logs + site * S.K + columns, mask=columns < S.K, other=0.0)


@triton.jit
def store_log(logs, site, value, first, S: tl.constexpr):
    """Write what ``load_log`` reads."""
    columns = first + tl.arange(0, S.BK)
    tl.store(logs + site * S.K + columns, value, mask=columns < S.K)


@triton.jit(do_not_specialize=["T", "N", "NG"])
def sums_kernel(x, sums, plane, table, T, N, NG, S: tl.constexpr):
    """Running sums ``[planes, B*T, H, K]`` of the gates of every chunk, clamped; NaN from a gate of NaN or infinite growth on.

    Grid: tiles of K x H x chunks, tiles fastest.
    """
    TILES: tl.constexpr = (S.K + S.BK - 1) // S.BK
    first = tl.program_id(0) % TILES * S.BK
    h = tl.program_id(0) // TILES % S.H
    chunk = tl.program_id(0) // (TILES * S.H)
    at = locate(chunk, table, T, N, NG, N, S.PACKED)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    raw = load_columns(x.g + h * S.K, x.stride_g, here, first, S)
    gates = raw.to(tl.float64 if S.EXACT else tl.float32)
    gates = tl.where(gates < float("inf"), tl.maximum(gates, GATE_FLOOR), float("nan")) * LOG2_E
    total = tl.cumsum(gates, axis=0)
    high = total.to(tl.float32)
    store_columns(sums + h * S.K, S.H * S.K, here, high, first, S)
    if S.EXACT:
        store_columns(sums + plane + h * S.K, S.H * S.K, here, total - high.to(tl.float64), first, S)
