"""GAINS: the factors of the query side of the backward pass, and what becomes of the sums that it leaves, by four warps.

The warps that multiply leave, for each query of a head, product · q · decay for each level: of the other chunk of the tile, of
the tile before, of each entry. From these come dλ, the gains of the rows and the gains by level. The warps of this file make
the factors of a head, then store the results of the head before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from loglinear.kernels.decay.span.factors import decay, first_steps, path_step
from loglinear.kernels.decay.span.tile import slot_of
from loglinear.kernels.tree.place import log2_of_power

SUMS = gl.constexpr(16)  # rows of sums: the other chunk, the tile before, the path of 14 entries at most
ROWS = gl.constexpr(32)  # (decay, λ times the factor of o) of each


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
def make_factors(factors, logs, tile, i, factor, L, S: gl.constexpr, ROW: gl.constexpr):
    """The factors of the i-th head of a program."""
    r = gl.arange(0, 128, layout=ROW)
    second = r // 64
    present = r < tile.size
    h = tile.h0 + i
    scales = logs.scales + tile.origin.to(gl.int64) * logs.stride + h * L
    l7 = gl.load(scales + (r * logs.stride + 7), mask=present, other=0.0)
    l8 = gl.load(scales + (r * logs.stride + gl.minimum(8, L - 1)), mask=present, other=0.0)
    sums = logs.sums + h.to(gl.int64) * logs.sums_stride + tile.origin
    g = gl.load(sums + r, mask=present, other=0.0)
    chunk_log = logs.chunk_log + tile.chunk.to(gl.int64) * S.H + h
    own_log = gl.load(chunk_log + second * S.H, mask=second * 64 < tile.size, other=0.0)
    since = gl.where(second == 1, gl.load(chunk_log), 0.0)
    before0 = gl.load(chunk_log - 2 * S.H, mask=tile.second == 1, other=0.0)
    before1 = gl.load(chunk_log - S.H, mask=tile.second == 1, other=0.0)
    before_g = gl.load(sums - 128 + r, mask=(r >= 0) & (tile.second == 1), other=0.0)
    scale0, scale1, scale2, log0, log1, log2, ahead = first_steps(logs, scales, tile, h, r, present, factor, L, S.H)

    slot, phase = slot_of(i, 2)
    mbarrier.wait(factors.empty.index(slot), phase ^ 1)
    row = slot * ROWS
    factors.rows.index(row).store(gl.exp2(g))
    factors.rows.index(row + 1).store(l7.to(gl.float32) * factor)
    since += g
    factors.rows.index(row + 2).store(gl.exp2(since))
    factors.rows.index(row + 3).store(l8.to(gl.float32) * factor)
    factors.columns.index(slot * 2).store(decay(own_log - g))
    first = gl.where(second == 1, decay(before1 - before_g), decay(before0 - before_g) * gl.exp2(before1))
    factors.columns.index(slot * 2 + 1).store(first)
    since += before0 + before1
    e = tile.path
    row += 4
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
def store_level(results, gain, tile, m, h, H: gl.constexpr):
    """The gains of the two chunks of a tile through an entry of 2^m chunks."""
    total = gl.sum(gl.reshape(gain, [2, 64]), axis=1)
    chunk = gl.arange(0, 2, layout=total.type.layout)
    place = results.levels + (m * H + h).to(gl.int64) * results.chunks + tile.chunk
    gl.store(place + chunk, total, mask=chunk * 64 < tile.size)


@gluon.jit
def sum_of_step(sums, factors, slot, step, present, ROW: gl.constexpr):
    """(sum, λ times the factor of o) of a step of the walk; zero where no sum was left."""
    found = gl.where(present, sums.rows.index(slot * SUMS + step).load(ROW), 0.0)
    return found, factors.rows.index(slot * ROWS + 2 * step + 1).load(ROW)


@gluon.jit
def add_level(gradient, gains, found, scale, results, tile, h, m, L, H: gl.constexpr, GATED: gl.constexpr):
    """(dλ ``[128, LEVELS]``, gains of the rows) with those of a step of the walk, through an entry of 2^m chunks."""
    c = gl.arange(0, gradient.shape[1], layout=gl.SliceLayout(0, gradient.type.layout))[None, :]
    gain = found * scale
    if GATED:
        store_level(results, gain, tile, m, h, H)
    return gradient + gl.where(c == gl.minimum(m + 7, L - 1), found[:, None], 0.0), gains + gain


@gluon.jit
def store_sums(sums, factors, results, tile, i, factor, L, S: gl.constexpr, GATED: gl.constexpr):
    """dλ of the i-th head of a program, above the levels of a chunk; completes the gains of the rows, stores those by level."""
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, S.LEVELS], [32, 1], [4, 1], [1, 0])
    BY_LEVEL: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, BY_ROW)
    r = gl.arange(0, 128, layout=ROW)
    token = gl.arange(0, 128, layout=gl.SliceLayout(1, BY_LEVEL))[:, None]
    column = gl.arange(0, S.LEVELS, layout=gl.SliceLayout(0, BY_LEVEL))[None, :]
    present = r < tile.size
    h = tile.h0 + i
    row_gains = results.rows + h.to(gl.int64) * results.tokens + tile.origin + r
    gains = gl.zeros([128], gl.float32, layout=ROW)
    if GATED:
        gains = gl.load(row_gains, mask=present, other=0.0)
    gradient = gl.zeros([128, S.LEVELS], gl.float32, layout=BY_ROW)
    slot, phase = slot_of(i, 2)
    mbarrier.wait(sums.full.index(slot), phase)
    zero = gl.to_tensor(0)
    found, scale = sum_of_step(sums, factors, slot, zero, present & (r >= 64), ROW)
    gradient, gains = add_level(gradient, gains, found, scale, results, tile, h, zero, L, S.H, GATED)
    if tile.second == 1:
        found, scale = sum_of_step(sums, factors, slot, zero + 1, present, ROW)
        gradient, gains = add_level(gradient, gains, found, scale, results, tile, h, zero + 1, L, S.H, GATED)
    e = tile.path
    step = zero + 2
    while e > 0:
        m = log2_of_power(e & -e)
        found, scale = sum_of_step(sums, factors, slot, step, present, ROW)
        gradient, gains = add_level(gradient, gains, found, scale, results, tile, h, m, L, S.H, GATED)
        step += 1
        e = e & (e - 1)
    mbarrier.arrive(sums.empty.index(slot), count=1)
    if GATED:
        gl.store(row_gains, gains, mask=present)
    gradient = gl.convert_layout((gradient * factor).to(results.dscales.dtype.element_ty), BY_LEVEL)
    target = results.dscales + tile.origin.to(gl.int64) * (S.H * L) + h * L
    written = (token < tile.size) & (column > 6) & (column < L)
    gl.store(target + (token * (S.H * L) + column), gradient, mask=written)


@gluon.jit
def write_gains(factors, sums, logs, results, tile, factor, L, S: gl.constexpr, GATED: gl.constexpr):
    """The role: the factors of each head, and the results of the head before it."""
    ROW: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 16], [32, 1], [4, 1], [1, 0]))
    for i in range(S.HEADS + 1):
        if i < S.HEADS:
            make_factors(factors, logs, tile, i, factor, L, S, ROW)
        if i > 0:
            store_sums(sums, factors, results, tile, i - 1, factor, L, S, GATED)
