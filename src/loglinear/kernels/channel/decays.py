"""DECAYS of channels inside a chunk, level by level of its tree. Logs are float32 in base 2.

Two tokens of neighbouring blocks meet at the boundary between them. Their decay is that of the key to its block's end, times
that of the query from the start of its own. Neither factor exceeds 1. Blocks of 1, 2, 4, … tokens give all pairs of a chunk:
those of level 1, 2, 3, …. A log is a difference of two running sums inside the chunk; float32 inputs keep these as
pairs (value, rounding error), as tree/decays.py does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import GATE_FLOOR, LOG2_E
from loglinear.kernels.tree.place import chunk_of, locate
from loglinear.kernels.tree.tiles import load_tokens, store_tokens


@triton.jit
def settled(x, S: tl.constexpr):
    """x ``[M, N]`` in float32, in the registers in which a product leaves its result and expects its left operand.

    The compiler knows no other way to ask for this than a product with zero. It would keep x where a load has put it, and move
    all that is made of x through memory, level by level.
    """
    x = x.to(tl.float32)
    if not S.EXACT:
        x = tl.dot(tl.zeros([x.shape[0], 16], tl.bfloat16), tl.zeros([16, x.shape[1]], tl.bfloat16), acc=x)
    return x


@triton.jit
def between(early_high, early_low, late_high, late_low, S: tl.constexpr):
    """Decay from a running sum of a chunk to a later one."""
    log = late_high - early_high
    if S.EXACT:
        log += late_low - early_low
    return tl.exp2(log)


@triton.jit
def either_way(one_high, one_low, other_high, other_low, S: tl.constexpr):
    """Decay between two running sums of a chunk, whichever is the later."""
    log = other_high - one_high
    if S.EXACT:
        log += other_low - one_low
    return tl.exp2(-tl.abs(log))


@triton.jit
def level_ends(level, t):
    """The last place before the boundary at which each token at ``t`` meets its partners of a level."""
    return (((t >> level) | 1) << level) - 1


@triton.jit
def load_rows(base, stride, here, t, first, S: tl.constexpr):
    """Columns ``[..., BK]`` from ``first`` on of the tokens at places ``t [...]`` of a chunk, of K; 0 past the end."""
    rows, columns = tl.expand_dims(t, -1), first + tl.arange(0, S.BK)
    pointers = base + here.origin * stride + (rows * stride + columns)
    return tl.load(pointers, mask=(rows < here.size) & (columns < S.K), other=0.0)


@triton.jit
def store_rows(base, stride, here, t, value, first, S: tl.constexpr):
    """Write what ``load_rows`` reads."""
    rows, columns = t[:, None], first + tl.arange(0, S.BK)[None, :]
    pointers = base + here.origin * stride + (rows * stride + columns)
    tl.store(pointers, value.to(base.dtype.element_ty), mask=(rows < here.size) & (columns < S.K))


@triton.jit
def in_odd_block(level, t):
    """Which tokens are in an odd block of 2^level tokens: the queries of the level. The others are its keys."""
    return (t >> level) & 1 == 1


@triton.jit
def meet(level, t):
    """Pairs ``[..., n, n]`` of tokens in two neighbouring blocks of 2^level tokens, in either order: level is their highest
    differing bit."""
    return (tl.expand_dims(t, -1) ^ tl.expand_dims(t, -2)) >> level == 1


@triton.jit
def load_sums(sums, here, h, t, first, S: tl.constexpr):
    """Running sums ``[..., BK]`` at places ``t [...]`` of a chunk, or at its last token: (value, its rounding error or 0)."""
    WIDTH: tl.constexpr = 2 * S.K if S.EXACT else S.K
    columns = first + tl.arange(0, S.BK)
    rows = tl.expand_dims(tl.minimum(t, tl.minimum(here.size, S.C) - 1), -1)
    pointers = sums + (here.origin * S.HEADS + h) * WIDTH + (rows * (S.HEADS * WIDTH) + columns)
    inside = (columns < S.K) & (rows >= 0)
    high = tl.load(pointers, mask=inside, other=0.0)
    if S.EXACT:
        low = tl.load(pointers + S.K, mask=inside, other=0.0)
    else:
        low = tl.zeros_like(high)
    return high, low


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
def sums_kernel(x, sums, table, T, N, NG, S: tl.constexpr):
    """Running sums ``[B*T, H, 1 or 2, K]`` of the gates of every chunk, clamped; NaN from a gate of NaN or infinite growth on.

    Grid: tiles of K x H x chunks, tiles fastest.
    """
    TILES: tl.constexpr = (S.K + S.BK - 1) // S.BK
    WIDTH: tl.constexpr = 2 * S.K if S.EXACT else S.K
    first = tl.program_id(0) % TILES * S.BK
    h = tl.program_id(0) // TILES % S.H
    chunk = tl.program_id(0) // (TILES * S.H)
    at = locate(chunk, table, T, N, NG, N, S.PACKED)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    raw = load_tokens(x.g, x.stride_g, h, here, S.C, S.K, S.BK, first)
    gates = raw.to(tl.float64 if S.EXACT else tl.float32)
    gates = tl.where(gates < float("inf"), tl.maximum(gates, GATE_FLOOR), float("nan")) * LOG2_E
    total = tl.cumsum(gates, axis=0)
    high = total.to(tl.float32)
    head = sums + h * WIDTH
    store_tokens(head, S.H * WIDTH, 0, here, high, S.C, S.K, S.BK, first)
    if S.EXACT:
        store_tokens(head + S.K, S.H * WIDTH, 0, here, total - high.to(tl.float64), S.C, S.K, S.BK, first)
