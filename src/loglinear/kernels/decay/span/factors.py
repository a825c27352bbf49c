"""FACTORS: what is one number a token of the weights of a tile, λ and decays, made by four warps one head ahead.

Where all pairs of a block have one level, a weight is a factor of the query times a factor of the key. Only the 16 x 16
blocks on the diagonal are masks. Shared memory has room for two heads: while one is used, the next one is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from loglinear.kernels.decay.span.tile import slot_of
from loglinear.kernels.tree.decays import at_most_zero
from loglinear.kernels.tree.place import log2_of_power

ROWS = gl.constexpr(24)  # of queries: 0-2 towards sub-blocks of 16, 3 the other chunk, 4 the tile before, 5 … the path
COLUMNS = gl.constexpr(4)  # of keys: to the end of their sub-block, of their chunk, of the span's first half; 3 is free
LOCAL = gl.constexpr(16)  # levels 0 … 8, padded


class Factors(NamedTuple):
    """rows ``[2 ROWS, 128]``, columns ``[2 COLUMNS, 128]``, near ``[2, 128, 16]``, with the barriers of the two."""

    rows: Any
    columns: Any
    near: Any
    full: Any
    empty: Any


class Logs(NamedTuple):
    """Pointers to λ of token 0 and to the logs of ``States``, with the distances of tokens and of heads."""

    scales: Any
    stride: Any
    sums: Any
    sums_stride: Any
    chunk_log: Any
    entry_log: Any


@gluon.jit
def decay(log):
    """exp2 of at most 0; NaN for NaN."""
    return gl.exp2(at_most_zero(log))


@gluon.jit
def level_of(scales, levels, level):
    """Column ``level`` of λ ``[128, 16]``: a thread has a whole row, so no number moves."""
    return gl.sum(gl.where(levels == level, scales, 0.0), axis=1)


@gluon.jit
def path_step(logs, scales, tile, e, h, r, present, factor, L, H: gl.constexpr):
    """(λ ``[128]`` towards entry e times the factor of o, the log of the entry); zero for entry 0."""
    level = gl.minimum(log2_of_power(gl.maximum(e & -e, 1)) + 7, L - 1)
    scale = gl.load(scales + (r * logs.stride + level), mask=present & (e > 0), other=0.0).to(gl.float32)
    log = gl.load(logs.entry_log + (tile.chunk0 + e - 1).to(gl.int64) * H + h, mask=e > 0, other=0.0)
    return scale * factor, log


@gluon.jit
def first_steps(logs, scales, tile, h, r, present, factor, L, H: gl.constexpr):
    """The first three steps of a path, (λ, λ, λ, log, log, log, entry of the third): loads for a step take longer than it."""
    second = tile.path & (tile.path - 1)
    third = second & (second - 1)
    scale0, log0 = path_step(logs, scales, tile, tile.path, h, r, present, factor, L, H)
    scale1, log1 = path_step(logs, scales, tile, second, h, r, present, factor, L, H)
    scale2, log2 = path_step(logs, scales, tile, third, h, r, present, factor, L, H)
    return scale0, scale1, scale2, log0, log1, log2, third


@gluon.jit
def write_factors(factors, logs, tile, factor, L, S: gl.constexpr):
    """The role: factors of all heads of the tile, one after the other. S.LEVELS: how many of levels 0 … 8 there are."""
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [4, 1], [1, 0])
    BY_LEVEL: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, BY_ROW)
    PARTS: gl.constexpr = S.V // 64
    r = gl.arange(0, 128, layout=ROW)
    c = gl.arange(0, 16, layout=gl.SliceLayout(0, BY_ROW))[None, :]
    token = gl.arange(0, 128, layout=gl.SliceLayout(1, BY_LEVEL))[:, None]
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, BY_LEVEL))[None, :]
    block = r % 64 // 16  # of the row in its chunk
    second = r // 64  # chunk of the row in the tile
    own = r // 16 * 16
    apart = (r % 16)[:, None] ^ c
    below = c <= (r % 16)[:, None]
    present = r < tile.size
    for i in range(S.HEADS * PARTS):
        h = tile.h0 + i // PARTS
        scales = logs.scales + tile.origin.to(gl.int64) * logs.stride + h * L
        wide = gl.load(scales + (token * logs.stride + gl.minimum(column, L - 1)), mask=token < tile.size, other=0.0)
        sums = logs.sums + h.to(gl.int64) * logs.sums_stride + tile.origin
        g = gl.load(sums + r, mask=present, other=0.0)
        near_g = gl.load(sums + own[:, None] + c, mask=own[:, None] + c < tile.size, other=0.0)
        chunk = second * 64
        end0 = gl.load(sums + chunk + 15, mask=chunk + 15 < tile.size, other=0.0)
        end1 = gl.load(sums + chunk + 31, mask=chunk + 31 < tile.size, other=0.0)
        end2 = gl.load(sums + chunk + 47, mask=chunk + 47 < tile.size, other=0.0)
        own_end = gl.load(sums + own + 15, mask=own + 15 < tile.size, other=0.0)
        chunk_log = logs.chunk_log + tile.chunk.to(gl.int64) * S.H + h
        own_log = gl.load(chunk_log + second * S.H, mask=chunk < tile.size, other=0.0)
        since = gl.where(second == 1, gl.load(chunk_log), 0.0)  # from the tile's start to the row's chunk
        before0 = gl.load(chunk_log - 2 * S.H, mask=tile.second == 1, other=0.0)
        before1 = gl.load(chunk_log - S.H, mask=tile.second == 1, other=0.0)
        before_g = gl.load(sums - 128 + r, mask=(r >= 0) & (tile.second == 1), other=0.0)
        steps = first_steps(logs, scales, tile, h, r, present, factor, L, S.H)
        lam = gl.convert_layout(wide, BY_ROW).to(gl.float32)

        slot, phase = slot_of(i, 2)
        mbarrier.wait(factors.empty.index(slot), phase ^ 1)
        l5 = level_of(lam, c, min(5, S.LEVELS - 1))
        l6 = level_of(lam, c, min(6, S.LEVELS - 1))
        near = gl.where(apart == 0, level_of(lam, c, 0)[:, None], level_of(lam, c, min(1, S.LEVELS - 1))[:, None])
        near = gl.where(apart >= 2, level_of(lam, c, min(2, S.LEVELS - 1))[:, None], near)
        near = gl.where(apart >= 4, level_of(lam, c, min(3, S.LEVELS - 1))[:, None], near)
        near = gl.where(apart >= 8, level_of(lam, c, min(4, S.LEVELS - 1))[:, None], near)
        near = gl.where(below, near * decay(g[:, None] - near_g), 0.0)
        factors.near.index(slot).store(near)

        rows = slot * ROWS
        f0 = gl.where(block == 1, l5, l6) * decay(g - end0)
        factors.rows.index(rows + 0).store(gl.where(block > 0, f0, 0.0))
        factors.rows.index(rows + 1).store(gl.where(block > 1, l6 * decay(g - end1), 0.0))
        factors.rows.index(rows + 2).store(gl.where(block > 2, l5 * decay(g - end2), 0.0))
        factors.rows.index(rows + 3).store(level_of(lam, c, min(7, S.LEVELS - 1)) * gl.exp2(g))
        since += g
        factors.rows.index(rows + 4).store(level_of(lam, c, min(8, S.LEVELS - 1)) * gl.exp2(since))
        columns = slot * COLUMNS
        factors.columns.index(columns + 0).store(decay(own_end - g))
        factors.columns.index(columns + 1).store(decay(own_log - g))
        first = gl.where(second == 1, decay(before1 - before_g), decay(before0 - before_g) * gl.exp2(before1))
        factors.columns.index(columns + 2).store(first)

        since += before0 + before1
        e = tile.path
        row = rows + 5
        scale0, scale1, scale2, log0, log1, log2, ahead = steps
        while e > 0:
            factors.rows.index(row).store(scale0 * gl.exp2(since))
            since += log0
            row += 1
            e = e & (e - 1)
            ahead = ahead & (ahead - 1)
            scale0, log0, scale1, log1 = scale1, log1, scale2, log2
            scale2, log2 = path_step(logs, scales, tile, ahead, h, r, present, factor, L, S.H)
        mbarrier.arrive(factors.full.index(slot), count=1)
