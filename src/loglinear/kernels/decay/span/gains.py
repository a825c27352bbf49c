"""GAINS: the factors of the query side of the backward pass, and what becomes of the sums that it leaves, by four warps.

The warps that multiply leave, for each query of a head, the sum of score · dP · decay over the keys of each level. From these
come dλ, the gains of the rows and the gains by level. The warps of this file make the factors of a head, then store the
results of the head before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from loglinear.kernels.decay.span.factors import COLUMNS, decay, fetch_ahead, first_steps, level_of, path_step
from loglinear.kernels.decay.span.tile import slot_of
from loglinear.kernels.tree.place import log2_of_power

PATH = gl.constexpr(10)  # entries of a path, at most
LAMBDA = gl.constexpr(
    1
)  # row 0: the log-decay from the start of the chunk; from row 1 on: λ of levels 0 … 6 times the factor
ENDS = gl.constexpr(8)  # rows 8 … 10: decays from the ends of sub-blocks 0 … 2
STEPS = gl.constexpr(11)  # from here on (decay, λ) of each product: the other chunk, the tile before, the path
ROWS = gl.constexpr(35)  # STEPS + 2 (2 + PATH)
SUMS = gl.constexpr(19)  # rows of sums: levels 0 … 8, the path


class Sums(NamedTuple):
    """rows ``[2 SUMS, 128]``, with the barriers of the two."""

    rows: Any
    full: Any
    empty: Any


class Results(NamedTuple):
    """Pointers to dλ and to the gains of the rows and by level, the number of all tokens and of all chunks."""

    dscales: Any
    rows: Any
    levels: Any
    tokens: Any
    chunks: Any


@gluon.jit
def make_factors(factors, logs, tile, i, factor, L, S: gl.constexpr, LOCAL: gl.constexpr, BY_ROW: gl.constexpr):
    """The factors of the i-th head of a program. LOCAL: how many of levels 0 … 8 there are."""
    BY_LEVEL: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
    r = gl.arange(0, 128, layout=gl.SliceLayout(1, BY_ROW))
    c = gl.arange(0, 16, layout=gl.SliceLayout(0, BY_ROW))[None, :]
    token = gl.arange(0, 128, layout=gl.SliceLayout(1, BY_LEVEL))[:, None]
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, BY_LEVEL))[None, :]
    block = r % 64 // 16
    second = r // 64
    present = r < tile.size
    h = tile.h0 + i
    scales = logs.scales + tile.origin.to(gl.int64) * logs.stride + h * L
    wide = gl.load(scales + (token * logs.stride + gl.minimum(column, L - 1)), mask=token < tile.size, other=0.0)
    sums = logs.sums + h.to(gl.int64) * logs.sums_stride + tile.origin
    g = gl.load(sums + r, mask=present, other=0.0)
    chunk = second * 64
    end0 = gl.load(sums + chunk + 15, mask=chunk + 15 < tile.size, other=0.0)
    end1 = gl.load(sums + chunk + 31, mask=chunk + 31 < tile.size, other=0.0)
    end2 = gl.load(sums + chunk + 47, mask=chunk + 47 < tile.size, other=0.0)
    own_end = r // 16 * 16 + 15
    own_end = gl.load(sums + own_end, mask=own_end < tile.size, other=0.0)
    chunk_log = logs.chunk_log + tile.chunk.to(gl.int64) * S.H + h
    own_log = gl.load(chunk_log + second * S.H, mask=chunk < tile.size, other=0.0)
    since = gl.where(second == 1, gl.load(chunk_log), 0.0)
    before0 = gl.load(chunk_log - 2 * S.H, mask=tile.second == 1, other=0.0)
    before1 = gl.load(chunk_log - S.H, mask=tile.second == 1, other=0.0)
    before_g = gl.load(sums - 128 + r, mask=(r >= 0) & (tile.second == 1), other=0.0)
    steps = first_steps(logs, scales, tile, h, r, present, factor, L, S.H)
    lam = gl.convert_layout(wide, BY_ROW).to(gl.float32) * factor
    fetch_ahead(logs, tile, h + 1, r, L, S)

    slot, phase = slot_of(i, 2)
    mbarrier.wait(factors.empty.index(slot), phase ^ 1)
    rows = slot * ROWS
    factors.rows.index(rows).store(g)
    for level in gl.static_range(7):
        factors.rows.index(rows + LAMBDA + level).store(level_of(lam, c, min(level, LOCAL - 1)))
    factors.rows.index(rows + ENDS).store(gl.where(block > 0, decay(g - end0), 0.0))
    factors.rows.index(rows + ENDS + 1).store(gl.where(block > 1, decay(g - end1), 0.0))
    factors.rows.index(rows + ENDS + 2).store(gl.where(block > 2, decay(g - end2), 0.0))
    factors.rows.index(rows + STEPS).store(gl.exp2(g))
    factors.rows.index(rows + STEPS + 1).store(level_of(lam, c, min(7, LOCAL - 1)))
    since += g
    factors.rows.index(rows + STEPS + 2).store(gl.exp2(since))
    factors.rows.index(rows + STEPS + 3).store(level_of(lam, c, min(8, LOCAL - 1)))
    columns = slot * COLUMNS
    factors.columns.index(columns).store(decay(own_end - g))
    factors.columns.index(columns + 1).store(decay(own_log - g))
    first = gl.where(second == 1, decay(before1 - before_g), decay(before0 - before_g) * gl.exp2(before1))
    factors.columns.index(columns + 2).store(first)
    since += before0 + before1
    e = tile.path
    row = rows + STEPS + 4
    scale0, scale1, scale2, log0, log1, log2, ahead = steps
    while e > 0:
        factors.rows.index(row).store(gl.exp2(since))
        factors.rows.index(row + 1).store(scale0)
        since += log0
        row += 2
        e = e & (e - 1)
        ahead = ahead & (ahead - 1)
        scale0, log0, scale1, log1 = scale1, log1, scale2, log2
        scale2, log2 = path_step(logs, scales, tile, ahead, h, r, present, factor, L, S.H)
    mbarrier.arrive(factors.full.index(slot), count=1)


@gluon.jit
def store_level(results, gain, r, tile, m, h, H: gl.constexpr):
    """The gains of the two chunks of a tile through an entry of 2^m chunks."""
    place = results.levels + (m * H + h).to(gl.int64) * results.chunks + tile.chunk
    gl.store(place, gl.sum(gl.where(r < 64, gain, 0.0), axis=0))
    gl.store(place + 1, gl.sum(gl.where(r < 64, 0.0, gain), axis=0), mask=tile.size > 64)


@gluon.jit
def store_sums(sums, factors, results, tile, i, factor, L, S: gl.constexpr, GATED: gl.constexpr):
    """dλ of the i-th head of a program, and the gains."""
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, S.LEVELS], [32, 1], [4, 1], [1, 0])
    BY_LEVEL: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, BY_ROW)
    r = gl.arange(0, 128, layout=ROW)
    c = gl.arange(0, S.LEVELS, layout=gl.SliceLayout(0, BY_ROW))[None, :]
    token = gl.arange(0, 128, layout=gl.SliceLayout(1, BY_LEVEL))[:, None]
    column = gl.arange(0, S.LEVELS, layout=gl.SliceLayout(0, BY_LEVEL))[None, :]
    present = r < tile.size
    h = tile.h0 + i
    slot, phase = slot_of(i, 2)
    mbarrier.wait(sums.full.index(slot), phase)
    rows, base = slot * ROWS, slot * SUMS
    gradient = gl.where(c == 0, sums.rows.index(base).load(ROW)[:, None], 0.0)
    gains = gl.zeros([128], gl.float32, layout=ROW)
    for level in gl.static_range(1, 7):
        found = sums.rows.index(base + level).load(ROW)
        gradient += gl.where(c == gl.minimum(level, L - 1), found[:, None], 0.0)
        gains += found * factors.rows.index(rows + LAMBDA + level).load(ROW)
    found = gl.where((r >= 64) & present, sums.rows.index(base + 7).load(ROW), 0.0)
    gradient += gl.where(c == gl.minimum(7, L - 1), found[:, None], 0.0)
    gain = found * factors.rows.index(rows + STEPS + 1).load(ROW)
    gains += gain
    if GATED:
        place = results.levels + h.to(gl.int64) * results.chunks + tile.chunk
        gl.store(place + 1, gl.sum(gain, axis=0), mask=tile.size > 64)
    if tile.second == 1:
        found = gl.where(present, sums.rows.index(base + 8).load(ROW), 0.0)
        gradient += gl.where(c == gl.minimum(8, L - 1), found[:, None], 0.0)
        gain = found * factors.rows.index(rows + STEPS + 3).load(ROW)
        gains += gain
        if GATED:
            store_level(results, gain, r, tile, gl.to_tensor(1), h, S.H)
    e = tile.path
    step = gl.to_tensor(0)
    while e > 0:
        m = log2_of_power(e & -e)
        found = gl.where(present, sums.rows.index(base + 9 + step).load(ROW), 0.0)
        gradient += gl.where(c == gl.minimum(m + 7, L - 1), found[:, None], 0.0)
        gain = found * factors.rows.index(rows + STEPS + 5 + 2 * step).load(ROW)
        gains += gain
        if GATED:
            store_level(results, gain, r, tile, m, h, S.H)
        step += 1
        e = e & (e - 1)
    if GATED:
        gl.store(results.rows + h.to(gl.int64) * results.tokens + tile.origin + r, gains, mask=present)
    mbarrier.arrive(sums.empty.index(slot), count=1)
    gradient = gl.convert_layout((gradient * factor).to(results.dscales.dtype.element_ty), BY_LEVEL)
    target = results.dscales + tile.origin.to(gl.int64) * (S.H * L) + h * L
    gl.store(target + (token * (S.H * L) + column), gradient, mask=(token < tile.size) & (column < L))


@gluon.jit
def write_gains(
    factors, sums, logs, results, tile, factor, L, S: gl.constexpr, LOCAL: gl.constexpr, GATED: gl.constexpr
):
    """The role: the factors of each head, and the results of the head before it."""
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [4, 1], [1, 0])
    for i in range(S.HEADS + 1):
        if i < S.HEADS:
            make_factors(factors, logs, tile, i, factor, L, S, LOCAL, BY_ROW)
        if i > 0:
            store_sums(sums, factors, results, tile, i - 1, factor, L, S, GATED)
