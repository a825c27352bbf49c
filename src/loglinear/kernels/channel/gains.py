"""GAINS of gates: the shares of dg that pairs of two chunks have in common, by channel.

Such a pair lies around all of a block of a chunk if its token in this chunk is the query and lies in a later block, or is the
key and lies in an earlier one. Other pairs skip the chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.channel.decays import load_log, store_log
from loglinear.kernels.tree.levels import SUB
from loglinear.kernels.tree.place import locate, log2_of_power, lowbit


@triton.jit
def of_other_blocks(gains, LATER: tl.constexpr, S: tl.constexpr):
    """``[16, BK]``: for each block of a chunk the sum of ``gains [C, BK]`` over the tokens of later, or earlier blocks."""
    own, other = tl.arange(0, 16)[:, None], (tl.arange(0, S.C) // SUB)[None, :]
    counted = other > own if LATER else other < own
    return tl.dot(tl.where(counted, 1.0, 0.0), gains, input_precision=S.PRECISION)


@triton.jit
def blocks_of(around, site, first, S: tl.constexpr):
    """Pointers ``[16, BK]`` and mask of the blocks of a site (int64) in ``around [sites, BLOCKS, K]``."""
    BLOCKS: tl.constexpr = S.C // SUB
    block, columns = tl.arange(0, 16)[:, None], first + tl.arange(0, S.BK)[None, :]
    return around + (site * BLOCKS + block) * S.K + columns, (block < BLOCKS) & (columns < S.K)


@triton.jit(do_not_specialize=["T", "N", "NG", "all_chunks"])
def window_sums_kernel(grads, table, T, N, NG, all_chunks, S: tl.constexpr):
    """``levels`` of a chunk, in place: the gains of the queries after it in the same window. Grid: tiles of K x H x chunks."""
    TILES: tl.constexpr = (S.K + S.BK - 1) // S.BK
    first = tl.program_id(0) % TILES * S.BK
    h = tl.program_id(0) // TILES % S.H
    chunk = tl.program_id(0) // (TILES * S.H)
    at = locate(chunk, table, T, N, NG, N, S.PACKED)
    e = chunk - at.chunk0 + 1
    if (at.length < 0) | (e * S.C >= at.length):
        return
    span = lowbit(e)
    end = tl.minimum(e + span, (at.length + S.C - 1) // S.C)
    later = tl.zeros([S.BK], tl.float32)
    for i in range(end - e):
        place = (log2_of_power(span) * all_chunks + at.chunk0 + end - 1 - i).to(tl.int64) * S.H + h
        own = load_log(grads.levels, place, first, S)
        store_log(grads.levels, place, later, first, S)
        later += own


@triton.jit
def skipping(grads, at, chunk, n, h, all_chunks, tiles, first, S: tl.constexpr):
    """``[BK]`` gains of the pairs that skip a chunk, by the entry of the key: queries in its window, and queries after it."""
    total = tl.zeros([S.BK], tl.float32)
    e = n
    while e > 0:
        place = (log2_of_power(lowbit(e)) * all_chunks + chunk).to(tl.int64) * S.H + h
        total += load_log(grads.levels, place, first, S)
        site = (at.chunk0 + e - 1).to(tl.int64) * S.H + h
        for tile in range(tiles):
            total += load_log(grads.beyond, tile * all_chunks.to(tl.int64) * S.H + site, first, S)
        e -= lowbit(e)
    return total
