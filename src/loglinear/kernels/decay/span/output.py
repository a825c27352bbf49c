"""SPAN OUTPUT: a tile of 128 queries attends to itself and to the rest of its span, then walks the entries before the span.

The scalar gate's output for Hopper, in the place of ``decay/output.py``. Q Kᵀ of a tile is made once for all heads of a
program and stays in registers; each head multiplies it by factors of its own. Entries shorter than a span are not read.
Roles: two groups of four warps multiply, 64 queries each; four warps make the factors; one warp loads.

A tile that is not whole, or whose octet has a token that is not finite, is computed with care: with the same products, but with
zeros for values that no query may see.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from loglinear.kernels.decay.span.factors import COLUMNS, ROWS, Factors, Logs, write_factors
from loglinear.kernels.decay.span.products import key_scores, seen, times, weighted
from loglinear.kernels.decay.span.tile import (
    LEAST_ENTRY,
    SLOTS,
    TILE,
    Ring,
    barriers,
    emptied,
    filled,
    put,
    slot_of,
    store_part,
    tile_of_program,
)
from loglinear.kernels.tree.place import row_of

REGISTERS = gl.constexpr(184)  # a thread, of those that multiply
FACTOR_REGISTERS = gl.constexpr(120)  # of those that make factors; all together 512, for four threads side by side


@gluon.jit
def load_tiles(q_desc, k_desc, v_desc, e_desc, ring, tile, S: gl.constexpr):
    """The role of one warp: queries and keys, then, head by head, values and entries."""
    column = tile.h0 // (S.H // S.G) * S.K
    i = gl.to_tensor(0)
    for half in gl.static_range(S.K // 64):
        i = put(q_desc, tile.origin, column + half * 64, ring, i, TILE)
    for half in gl.static_range(S.K // 64):
        i = put(k_desc, tile.origin, column + half * 64, ring, i, TILE)
    if tile.second == 1:
        for half in gl.static_range(S.K // 64):
            i = put(k_desc, tile.origin - TILE, column + half * 64, ring, i, TILE)
    for head in range(S.HEADS * (S.V // 64)):
        h = tile.h0 + head // (S.V // 64)
        first_v = head % (S.V // 64) * 64
        i = put(v_desc, tile.origin, h * S.V + first_v, ring, i, TILE)
        if tile.second == 1:
            i = put(v_desc, tile.origin - TILE, h * S.V + first_v, ring, i, TILE)
        e = tile.path
        while e > 0:
            i = put(e_desc, (row_of(tile.chunk0 + e - 1, LEAST_ENTRY) * S.H + h) * S.K, first_v, ring, i, S.K)
            e = e & (e - 1)


@gluon.jit
def unsound(checks, tile, S: gl.constexpr, CHECKS: gl.constexpr):
    """Whether, for any head of the program, a token of the tile's octet is not finite; see ``States``."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    head = gl.arange(0, 16, layout=LINE)
    first = checks + ((tile.octet.to(gl.int64) * S.H + tile.h0) + head) * CHECKS
    total = gl.zeros([16], gl.float32, layout=LINE)
    for check in gl.static_range(CHECKS):
        total += gl.load(first + check, mask=head < S.HEADS, other=0.0)
    return gl.sum(gl.where(gl.abs(total) < float("inf"), 0, 1), axis=0) > 0


@gluon.jit
def clean_values(values, clean, marks, tile, P: gl.constexpr):
    """Write values ``[64, 64]`` to ``clean``, zeros for tokens that are absent or not finite; marks: 1 for the others."""
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tokens = P * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, BY_ROW))
    v = values.load(BY_ROW)
    whole = (gl.sum(v.to(gl.float32) * 0.0, axis=1) == 0.0) & (tokens < tile.size)
    tma.store_wait(0)
    clean.store(gl.where(whole[:, None], v, 0.0).to(v.dtype))
    marks.store(gl.where(whole, 1.0, 0.0))
    fence_async_shared()


@gluon.jit
def own_chunk(w0, w1, w2, w3, values, FIRST: gl.constexpr, ACC: gl.constexpr):
    """The start of a chunk's output: weights ``[64, 16]`` of its four sub-blocks times values from FIRST on, under way."""
    zero = gl.zeros([64, 64], gl.float32, layout=ACC)
    acc = warpgroup_mma(w0, values.slice(FIRST, 16), zero, use_acc=False, is_async=True)
    acc = warpgroup_mma(w1, values.slice(FIRST + 16, 16), acc, is_async=True)
    acc = warpgroup_mma(w2, values.slice(FIRST + 32, 16), acc, is_async=True)
    return warpgroup_mma(w3, values.slice(FIRST + 48, 16), acc, is_async=True)


@gluon.jit
def attend(
    P: gl.constexpr, ring, factors, staged, o_desc, o, checks, tile, factor, S: gl.constexpr, CHECKS: gl.constexpr
):
    """The role of four warps: chunk P of the tile."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    HALVES: gl.constexpr = S.K // 64
    FIRST: gl.constexpr = P * 64
    dtype: gl.constexpr = ring.slots.dtype

    for half in gl.static_range(2 * HALVES):
        filled(ring, half)
    d0 = key_scores(ring, FIRST, HALVES, FIRST, 16, factor, S, A)
    d1 = key_scores(ring, FIRST, HALVES, FIRST + 16, 16, factor, S, A)
    d2 = key_scores(ring, FIRST, HALVES, FIRST + 32, 16, factor, S, A)
    d3 = key_scores(ring, FIRST, HALVES, FIRST + 48, 16, factor, S, A)
    other = gl.zeros([64, 64], dtype, layout=A)
    if P == 1:
        other = key_scores(ring, FIRST, HALVES, 0, 64, factor, S, A)
    before0 = gl.zeros([64, 64], dtype, layout=A)
    before1 = gl.zeros([64, 64], dtype, layout=A)
    it = gl.to_tensor(2 * HALVES)
    if tile.second == 1:
        for half in gl.static_range(HALVES):
            filled(ring, 2 * HALVES + half)
        before0 = key_scores(ring, FIRST, 2 * HALVES, 0, 64, factor, S, A)
        before1 = key_scores(ring, FIRST, 2 * HALVES, 64, 64, factor, S, A)
        for half in gl.static_range(HALVES):
            it = emptied(ring, 2 * HALVES + half)
    q0 = ring.slots.index(0).slice(FIRST, 64).load(A)
    q1 = q0
    if HALVES == 2:
        q1 = ring.slots.index(1).slice(FIRST, 64).load(A)
    fence_async_shared()  # else the next copies overtake these loads
    for half in gl.static_range(2 * HALVES):
        emptied(ring, half)

    scores = d0, d1, d2, d3, other, before0, before1
    if (tile.size < TILE) | unsound(checks, tile, S, CHECKS):
        each_head(P, ring, it, (q0, q1), scores, factors, staged, o_desc, o, tile, S, True)
    else:
        each_head(P, ring, it, (q0, q1), scores, factors, staged, o_desc, o, tile, S, False)
    tma.store_wait(0)


@gluon.jit
def each_head(
    P: gl.constexpr, ring, it, queries, scores, factors, staged, o_desc, o, tile, S: gl.constexpr, CAREFUL: gl.constexpr
):
    """The outputs of all heads, from queries and scores as operands. it: the next use of the ring."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    ROW_A: gl.constexpr = gl.SliceLayout(1, A)
    COLUMN_A: gl.constexpr = gl.SliceLayout(0, A)
    FIRST: gl.constexpr = P * 64
    q0, q1 = queries
    d0, d1, d2, d3, other, before0, before1 = scores
    block = gl.arange(0, 64, layout=ROW_A)[:, None] // 16
    zero = gl.zeros([64, 64], gl.float32, layout=ACC)
    for i in range(S.HEADS * (S.V // 64)):
        slot, phase = slot_of(i, 2)
        mbarrier.wait(factors.full.index(slot), phase)
        rows, columns = slot * ROWS, slot * COLUMNS
        near = factors.near.index(slot).slice(FIRST, 64).load(A)
        f0 = factors.rows.index(rows + 0).slice(FIRST, 64).load(ROW_A)
        f1 = factors.rows.index(rows + 1).slice(FIRST, 64).load(ROW_A)
        f2 = factors.rows.index(rows + 2).slice(FIRST, 64).load(ROW_A)
        c0 = factors.columns.index(columns).slice(FIRST, 16).load(COLUMN_A)
        c1 = factors.columns.index(columns).slice(FIRST + 16, 16).load(COLUMN_A)
        c2 = factors.columns.index(columns).slice(FIRST + 32, 16).load(COLUMN_A)
        w0 = times(d0, gl.where(block == 0, near, f0[:, None] * c0[None, :]))
        w1 = times(d1, gl.where(block == 1, near, f1[:, None] * c1[None, :]))
        w2 = times(d2, gl.where(block == 2, near, f2[:, None] * c2[None, :]))
        w3 = times(d3, gl.where(block == 3, near, 0.0))
        values = filled(ring, it)
        if CAREFUL:
            marks = factors.columns.index(columns + 3).slice(FIRST, 64)
            clean_values(values.slice(FIRST, 64), staged.index(P), marks, tile, P)
            w0, w1 = seen(w0, marks, 0, A), seen(w1, marks, 16, A)
            w2, w3 = seen(w2, marks, 32, A), seen(w3, marks, 48, A)
            acc = own_chunk(w0, w1, w2, w3, staged.index(P), 0, ACC)
            acc, w0, w1, w2, w3 = warpgroup_mma_wait(0, deps=(acc, w0, w1, w2, w3))
            if P == 1:
                f3 = factors.rows.index(rows + 3).slice(64, 64).load(ROW_A)
                w4 = weighted(other, f3, factors.columns.index(columns + 1).slice(0, 64).load(COLUMN_A))
                acc = warpgroup_mma(w4, values.slice(0, 64), acc, is_async=True)
                acc, w4 = warpgroup_mma_wait(0, deps=(acc, w4))
        else:
            acc = own_chunk(w0, w1, w2, w3, values, FIRST, ACC)
            if P == 1:
                f3 = factors.rows.index(rows + 3).slice(64, 64).load(ROW_A)
                w4 = weighted(other, f3, factors.columns.index(columns + 1).slice(0, 64).load(COLUMN_A))
                acc = warpgroup_mma(w4, values.slice(0, 64), acc, is_async=True)
                acc, w0, w1, w2, w3, w4 = warpgroup_mma_wait(0, deps=(acc, w0, w1, w2, w3, w4))
            else:
                acc, w0, w1, w2, w3 = warpgroup_mma_wait(0, deps=(acc, w0, w1, w2, w3))
        it = emptied(ring, it)
        if tile.second == 1:
            f4 = factors.rows.index(rows + 4).slice(FIRST, 64).load(ROW_A)
            b0 = weighted(before0, f4, factors.columns.index(columns + 2).slice(0, 64).load(COLUMN_A))
            b1 = weighted(before1, f4, factors.columns.index(columns + 2).slice(64, 64).load(COLUMN_A))
            values = filled(ring, it)
            acc = warpgroup_mma(b0, values.slice(0, 64), acc, is_async=True)
            acc = warpgroup_mma(b1, values.slice(64, 64), acc, is_async=True)
            acc, b0, b1 = warpgroup_mma_wait(0, deps=(acc, b0, b1))
            it = emptied(ring, it)
        e = tile.path
        row = rows + 5
        while e > 0:
            weight = factors.rows.index(row).slice(FIRST, 64).load(gl.SliceLayout(1, ACC))
            entry = filled(ring, it)
            part = warpgroup_mma(q0, entry.slice(0, 64), zero, use_acc=False, is_async=True)
            if S.K == 128:
                part = warpgroup_mma(q1, entry.slice(64, 64), part, is_async=True)
            part = warpgroup_mma_wait(0, deps=(part,))
            it = emptied(ring, it)
            acc += weight[:, None] * part
            row += 1
            e = e & (e - 1)
        mbarrier.arrive(factors.empty.index(slot), count=1)
        store(acc.to(ring.slots.dtype), staged.index(P), o_desc, o, tile, i, P, S)


@gluon.jit
def store(acc, staged, o_desc, o, tile, i, P: gl.constexpr, S: gl.constexpr):
    """Write the outputs of chunk P for the i-th part of the heads: by TMA, or token by token where the tile is not whole."""
    ACC: gl.constexpr = acc.type.layout
    column = (tile.h0 + i // (S.V // 64)) * S.V + i % (S.V // 64) * 64
    if tile.size >= TILE:
        tma.store_wait(0)
        staged.store(acc)
        fence_async_shared()
        store_part(o_desc, [tile.origin + P * 64, column], staged)
    else:
        r = P * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
        c = column + gl.arange(0, 64, layout=gl.SliceLayout(0, ACC))
        pointers = o + (tile.origin + r).to(gl.int64)[:, None] * (S.H * S.V) + c[None, :]
        gl.store(pointers, acc, mask=(r < tile.size)[:, None] & (c >= 0)[None, :])


@gluon.jit(do_not_specialize=["T", "N", "NG", "sums_stride", "L"])
def span_output_kernel(
    q_desc,
    k_desc,
    v_desc,
    e_desc,
    o_desc,
    x,
    L,
    states,
    o,
    table,
    T,
    N,
    NG,
    sums_stride,
    S: gl.constexpr,
    CHECKS: gl.constexpr,
):
    """Grid: H/HEADS x octets x 4 tiles, tiles fastest. float32: accumulators, factors; Q Kᵀ and weights are of v's dtype.

    CHECKS: sums of an octet in ``states.checks``.
    """
    tile = tile_of_program(table, T, N, NG, S)
    if tile.size > 0:
        NEAR: gl.constexpr = gl.SwizzledSharedLayout(4, 2, 4, [1, 0])
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        ring = Ring(
            gl.allocate_shared_memory(v_desc.dtype, [SLOTS, 128, 64], v_desc.layout),
            barriers(SLOTS, 1),
            barriers(SLOTS, 2),
        )
        factors = Factors(
            gl.allocate_shared_memory(gl.float32, [2 * ROWS, 128], FLAT),
            gl.allocate_shared_memory(gl.float32, [2 * COLUMNS, 128], FLAT),
            gl.allocate_shared_memory(gl.float32, [2, 128, 16], NEAR),
            barriers(2, 1),
            barriers(2, 2),
        )
        staged = gl.allocate_shared_memory(v_desc.dtype, [2, 64, 64], o_desc.layout)
        fence_async_shared()
        logs = Logs(x.scales, x.stride_scales, states.sums, sums_stride, states.chunk_log, states.entry_log)
        gl.warp_specialize(
            [
                (attend, (0, ring, factors, staged, o_desc, o, states.checks, tile, x.factor, S, CHECKS)),
                (attend, (1, ring, factors, staged, o_desc, o, states.checks, tile, x.factor, S, CHECKS)),
                (write_factors, (factors, logs, tile, x.factor, L, S)),
                (load_tiles, (q_desc, k_desc, v_desc, e_desc, ring, tile, S)),
            ],
            [4, 4, 1],
            [REGISTERS, FACTOR_REGISTERS, 24],
        )
