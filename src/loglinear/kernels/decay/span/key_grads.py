"""SPAN KEY GRADIENTS: dk, dv and the gains of 128 keys, from their tile and from one gradient of all later queries.

For Hopper, in the place of ``decay/value_grads.py`` and ``decay/key_grads.py``: the output turned round, keys in the rows.
Weights of the tile are again a factor of the key times a factor of the query, where all pairs of a block have one level.
Roles as in ``output.py``. ``own`` holds the halves of K, then of Q.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from loglinear.kernels.decay.span.factors import Factors, Logs, decay
from loglinear.kernels.decay.span.output import store
from loglinear.kernels.decay.span.products import key_scores, times, weighted
from loglinear.kernels.decay.span.tile import (
    TILE,
    WIDTH,
    Ring,
    barriers,
    emptied,
    filled,
    hidden_zero,
    load_part,
    put,
    slot_of,
    tile_of_program,
)
from loglinear.kernels.tree.place import row_of

SLOTS = gl.constexpr(6)
ROWS = gl.constexpr(
    8
)  # of keys: 0-2 to the start of sub-blocks 1 … 3, 3 to the tile's end, 4 to the chunk's end; of queries:
FROM_BLOCK = gl.constexpr(5)  # λ · decay from the start of their sub-block, of levels 5 and 6,
FROM_CHUNK = gl.constexpr(7)  # and from the start of their chunk, of level 7


class Tiles(NamedTuple):
    """Shared memory beside the ring: halves of K and of Q ``[4, 128, 64]`` with the barrier of their copies, the barrier of
    both groups once absent tokens are zero, and what dv is copied from ``[2, 64, 64]``.
    """

    own: Any
    loaded: Any
    cleared: Any
    staged: Any


class Results(NamedTuple):
    """dv as a descriptor and as a pointer, and a pointer to what belongs to the tile in dk."""

    dv_desc: Any
    dv: Any
    dk: Any


@gluon.jit
def load_tiles(q_desc, k_desc, v_desc, do_desc, d_desc, own, loaded, ring, tile, S: gl.constexpr):
    """The role of one warp: keys and queries, then, head by head, values, the gradient of the state after the tile, and dO."""
    column = tile.h0 // (S.H // S.G) * S.K
    mbarrier.expect(loaded.index(0), 4 * TILE * WIDTH * 2)
    for half in gl.static_range(2):
        load_part(k_desc, [tile.origin, column + half * 64], loaded.index(0), own.index(half))
        load_part(q_desc, [tile.origin, column + half * 64], loaded.index(0), own.index(2 + half))
    i = gl.to_tensor(0)
    for head in range(S.HEADS):
        h = tile.h0 + head
        i = put(v_desc, tile.origin, h * S.V, ring, i, TILE, SLOTS)
        if tile.size > WIDTH:
            i = put(d_desc, (row_of(tile.chunk + 1, 2) * S.H + h) * S.K, 0, ring, i, TILE, SLOTS)
        i = put(do_desc, tile.origin, h * S.V, ring, i, TILE, SLOTS)


@gluon.jit
def write_factors(factors, logs, tile, factor, L, S: gl.constexpr):
    """The role of four warps: the factors of all heads, one after the other."""
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [4, 1], [1, 0])
    r = gl.arange(0, 128, layout=gl.SliceLayout(1, BY_ROW))
    c = gl.arange(0, 16, layout=gl.SliceLayout(0, BY_ROW))[None, :]
    block, second = r % 64 // 16, r // 64
    present = r < tile.size
    query = (r // 16 * 16)[:, None] + c  # of the key's sub-block
    apart = (r % 16)[:, None] ^ c
    level = gl.minimum(gl.where(apart >= 8, 4, gl.where(apart >= 4, 3, gl.where(apart >= 2, 2, apart))), L - 1)
    sees = (c >= (r % 16)[:, None]) & (query < tile.size)
    for i in range(S.HEADS):
        h = tile.h0 + i
        scales = logs.scales + tile.origin.to(gl.int64) * logs.stride + h * L
        near = gl.load(scales + (query * logs.stride + level), mask=sees, other=0.0)
        l5 = gl.load(scales + (r * logs.stride + gl.minimum(5, L - 1)), mask=present, other=0.0)
        l6 = gl.load(scales + (r * logs.stride + gl.minimum(6, L - 1)), mask=present, other=0.0)
        l7 = gl.load(scales + (r * logs.stride + gl.minimum(7, L - 1)), mask=present, other=0.0)
        sums = logs.sums + h.to(gl.int64) * logs.sums_stride + tile.origin
        g = gl.load(sums + r, mask=present, other=0.0)
        near_g = gl.load(sums + query, mask=sees, other=0.0)
        chunk = second * 64
        end0 = gl.load(sums + chunk + 15, mask=chunk + 15 < tile.size, other=0.0)
        end1 = gl.load(sums + chunk + 31, mask=chunk + 31 < tile.size, other=0.0)
        end2 = gl.load(sums + chunk + 47, mask=chunk + 47 < tile.size, other=0.0)
        chunk_log = logs.chunk_log + tile.chunk.to(gl.int64) * S.H + h
        own_log = gl.load(chunk_log + second * S.H, mask=chunk < tile.size, other=0.0)
        next_log = gl.load(chunk_log + S.H, mask=tile.size > WIDTH, other=0.0)

        slot, phase = slot_of(i, 2)
        mbarrier.wait(factors.empty.index(slot), phase ^ 1)
        near = near.to(gl.float32) * factor * decay(near_g - g[:, None])
        factors.near.index(slot).store(gl.where(sees, near, 0.0))
        rows = slot * ROWS
        factors.rows.index(rows).store(gl.where(block < 1, decay(end0 - g), 0.0))
        factors.rows.index(rows + 1).store(gl.where(block < 2, decay(end1 - g), 0.0))
        factors.rows.index(rows + 2).store(gl.where(block < 3, decay(end2 - g), 0.0))
        to_end = decay(own_log - g)
        factors.rows.index(rows + 3).store(gl.where(second == 0, to_end * gl.exp2(next_log), to_end))
        factors.rows.index(rows + 4).store(to_end)
        start = gl.where(block == 1, end0, gl.where(block == 2, end1, end2))
        since = gl.where(block > 0, decay(g - start), 0.0) * factor
        factors.rows.index(rows + FROM_BLOCK).store(l5.to(gl.float32) * since)
        factors.rows.index(rows + FROM_BLOCK + 1).store(l6.to(gl.float32) * since)
        factors.rows.index(rows + FROM_CHUNK).store(l7.to(gl.float32) * (factor * gl.exp2(g)))
        mbarrier.arrive(factors.full.index(slot), count=1)


@gluon.jit
def clear_absent(tokens, cleared, phase, tile, P: gl.constexpr):
    """Zeros for the rows of chunk P in ``tokens [128, 64]`` where the sequence has no token. Both groups take part."""
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    r = P * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, BY_ROW))
    part = tokens.slice(P * 64, 64)
    x = part.load(BY_ROW)
    part.store(gl.where((r < tile.size)[:, None], x, 0.0).to(x.dtype))
    fence_async_shared()
    mbarrier.arrive(cleared.index(0), count=1)
    mbarrier.wait(cleared.index(0), phase)


@gluon.jit
def own_chunk(scores, factors, slot, do, acc, P: gl.constexpr):
    """acc plus the gradient of the values of chunk P from its own queries."""
    ACC: gl.constexpr = acc.type.layout
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, A)
    COLUMN: gl.constexpr = gl.SliceLayout(0, A)
    FIRST: gl.constexpr = P * 64
    rows = slot * ROWS
    block = gl.arange(0, 64, layout=ROW)[:, None] // 16
    near = factors.near.index(slot).slice(FIRST, 64).load(A)
    to1 = factors.rows.index(rows).slice(FIRST, 64).load(ROW)[:, None]
    to2 = factors.rows.index(rows + 1).slice(FIRST, 64).load(ROW)[:, None]
    to3 = factors.rows.index(rows + 2).slice(FIRST, 64).load(ROW)[:, None]
    from1 = factors.rows.index(rows + FROM_BLOCK).slice(FIRST + 16, 16).load(COLUMN)[None, :]
    from2 = factors.rows.index(rows + FROM_BLOCK + 1).slice(FIRST + 32, 16).load(COLUMN)[None, :]
    near3 = factors.rows.index(rows + FROM_BLOCK).slice(FIRST + 48, 16).load(COLUMN)[None, :]
    far3 = factors.rows.index(rows + FROM_BLOCK + 1).slice(FIRST + 48, 16).load(COLUMN)[None, :]
    w0 = times(scores[0], gl.where(block == 0, near, 0.0))
    w1 = times(scores[1], gl.where(block == 1, near, to1 * from1))
    w2 = times(scores[2], gl.where(block == 2, near, to2 * from2))
    w3 = times(scores[3], gl.where(block == 3, near, to3 * gl.where(block == 2, near3, far3)))
    acc = warpgroup_mma(w0, do.slice(FIRST, 16), acc, is_async=True)
    acc = warpgroup_mma(w1, do.slice(FIRST + 16, 16), acc, is_async=True)
    acc = warpgroup_mma(w2, do.slice(FIRST + 32, 16), acc, is_async=True)
    acc = warpgroup_mma(w3, do.slice(FIRST + 48, 16), acc, is_async=True)
    acc, w0, w1, w2, w3 = warpgroup_mma_wait(0, deps=(acc, w0, w1, w2, w3))
    return acc


@gluon.jit
def store_total(target, gain, token, tile, P: gl.constexpr, h, H: gl.constexpr):
    """The gains of chunk P together, to its place in ``target [chunks, H]``."""
    total = gl.sum(gl.where(token < tile.size, gain, 0.0), axis=0)
    gl.store(target + (tile.chunk + P).to(gl.int64) * H + h, total, mask=tile.size > P * 64)


@gluon.jit
def gradients(P: gl.constexpr, tiles, ring, factors, results, score_grads, gains, tile, tokens,
              S: gl.constexpr, GATED: gl.constexpr):  # fmt: skip
    """The role of four warps: chunk P of the tile. score_grads points at what belongs to the chunk."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    COLUMN: gl.constexpr = gl.SliceLayout(0, ACC)
    FIRST: gl.constexpr = P * 64
    dtype: gl.constexpr = ring.slots.dtype
    zero = gl.zeros([64, 64], gl.float32, layout=ACC)
    token = FIRST + gl.arange(0, 64, layout=ROW)
    own, loaded, cleared, staged = tiles
    mbarrier.wait(loaded.index(0), 0)
    if tile.size < TILE:
        clear_absent(own.index(2), cleared, 0, tile, P)
        clear_absent(own.index(3), cleared, 1, tile, P)
    keys = Ring(own, None, None)
    d0 = key_scores(keys, FIRST, 2, FIRST, 16, 1.0, S, A)
    d1 = key_scores(keys, FIRST, 2, FIRST + 16, 16, 1.0, S, A)
    d2 = key_scores(keys, FIRST, 2, FIRST + 32, 16, 1.0, S, A)
    d3 = key_scores(keys, FIRST, 2, FIRST + 48, 16, 1.0, S, A)
    other = gl.zeros([64, 64], dtype, layout=A)
    if P == 0:
        other = key_scores(keys, 0, 2, 64, 64, 1.0, S, A)
    left, right = zero, zero
    it = gl.to_tensor(0)
    for i in range(S.HEADS):
        slot, phase = slot_of(i, 2)
        here = hidden_zero()
        rows = slot * ROWS
        h = (tile.h0 + i).to(gl.int64)
        place = gains.columns + h * tokens + tile.origin + token
        inner = gl.zeros([64], gl.float32, layout=ROW)
        if GATED:
            inner = gl.load(place, mask=token < tile.size, other=0.0)
        loaded_values = it
        values = filled(ring, it, SLOTS).slice(FIRST, 64)
        it += 1
        mbarrier.wait(factors.full.index(slot), phase)
        acc = zero
        if tile.size > WIDTH:
            to_end = factors.rows.index(rows + 3).slice(FIRST, 64)
            a = (values.load(A).to(gl.float32) * to_end.load(gl.SliceLayout(1, A))[:, None]).to(dtype)
            later = filled(ring, it, SLOTS)
            acc = warpgroup_mma(
                own.index(here).slice(FIRST, 64), later.slice(0, 64), zero, use_acc=False, is_async=True
            )
            acc = warpgroup_mma(own.index(here + 1).slice(FIRST, 64), later.slice(64, 64), acc, is_async=True)
            left = warpgroup_mma(a, later.slice(0, 64).permute((1, 0)), left, is_async=True)
            right = warpgroup_mma(a, later.slice(64, 64).permute((1, 0)), right, is_async=True)
            acc, left, right, a = warpgroup_mma_wait(0, deps=(acc, left, right, a))
            it = emptied(ring, it, SLOTS)
            acc = acc * to_end.load(ROW)[:, None]
        if GATED and tile.second == 0:  # what an entry of two chunks passes on past its end
            gain = gl.sum(acc * values.load(ACC).to(gl.float32), axis=1)
            store_total(gains.beyond, gain, token, tile, P, h, S.H)
        do = filled(ring, it, SLOTS)
        if tile.size < TILE:
            clear_absent(do, cleared, i & 1, tile, P)
        if P == 0:
            to_chunk = factors.rows.index(rows + 4).slice(0, 64)
            since = factors.rows.index(rows + FROM_CHUNK).slice(64, 64)
            w = weighted(other, to_chunk.load(gl.SliceLayout(1, A)), since.load(gl.SliceLayout(0, A)))
            dp = warpgroup_mma(values, do.slice(64, 64).permute((1, 0)), zero, use_acc=False, is_async=True)
            acc = warpgroup_mma(w, do.slice(64, 64), acc, is_async=True)
            dp, acc, w = warpgroup_mma_wait(0, deps=(dp, acc, w))
            pairs = (dp * (to_chunk.load(ROW)[:, None] * since.load(COLUMN)[None, :])).to(dtype)
            b = gl.convert_layout(pairs, A)
            left = warpgroup_mma(b, own.index(here + 2).slice(64, 64), left, is_async=True)
            right = warpgroup_mma(b, own.index(here + 3).slice(64, 64), right, is_async=True)
            left, right, b = warpgroup_mma_wait(0, deps=(left, right, b))
        if GATED:
            gain = gl.sum(acc * values.load(ACC).to(gl.float32), axis=1)
            gl.store(place, inner + gain, mask=token < tile.size)
            store_total(gains.chunks, gain, token, tile, P, h, S.H)
        acc = own_chunk((d0, d1, d2, d3), factors, slot, do, acc, P)
        mbarrier.arrive(factors.empty.index(slot), count=1)
        fence_async_shared()
        emptied(ring, loaded_values, SLOTS)
        it = emptied(ring, it, SLOTS)
        store(acc.to(dtype), staged.index(P), results.dv_desc, results.dv, tile, i, P, S)

    s = gl.arange(0, 64, layout=gl.SliceLayout(1, A))[:, None]
    t = gl.arange(0, 64, layout=gl.SliceLayout(0, A))[None, :]
    a = gl.load(score_grads + t * 64 + s, mask=(s >= 0) & (t >= 0) & (tile.size > FIRST), other=0.0)
    left = warpgroup_mma(a, own.index(2).slice(FIRST, 64), left, is_async=True)
    right = warpgroup_mma(a, own.index(3).slice(FIRST, 64), right, is_async=True)
    left, right, a = warpgroup_mma_wait(0, deps=(left, right, a))
    column = gl.arange(0, 64, layout=COLUMN)[None, :]
    dk = results.dk
    target = dk + token[:, None] * (S.G * S.K) + column
    written = (token < tile.size)[:, None] & (column >= 0)
    gl.store(target, left.to(dk.dtype.element_ty), mask=written)
    gl.store(target + 64, right.to(dk.dtype.element_ty), mask=written)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "L"])
def span_key_grads_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    d_desc,
    dv_desc,
    x,
    L,
    states,
    score_grads,
    dk,
    dv,
    gains,
    table,
    T,
    N,
    NG,
    all_tokens,
    sums_stride,
    S: gl.constexpr,
):
    """The results of ``value_grads_kernel`` and ``key_grads_kernel``. Grid: H/HEADS x octets x 4 tiles, tiles fastest.

    float32: accumulators, factors, gains; K Qᵀ, weights and weighted values are of v's dtype.
    """
    tile = tile_of_program(table, T, N, NG, S)
    if tile.size > 0:
        NEAR: gl.constexpr = gl.SwizzledSharedLayout(4, 2, 4, [1, 0])
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        GATED: gl.constexpr = x.g is not None
        own = gl.allocate_shared_memory(v_desc.dtype, [4, 128, 64], v_desc.layout)
        loaded, cleared = barriers(1, 1), barriers(1, 2)
        slots = gl.allocate_shared_memory(v_desc.dtype, [SLOTS, 128, 64], v_desc.layout)
        ring = Ring(slots, barriers(SLOTS, 1), barriers(SLOTS, 2))
        rows = gl.allocate_shared_memory(gl.float32, [2 * ROWS, 128], FLAT)
        near = gl.allocate_shared_memory(gl.float32, [2, 128, 16], NEAR)
        factors = Factors(rows, None, near, barriers(2, 1), barriers(2, 2))
        staged = gl.allocate_shared_memory(v_desc.dtype, [2, 64, 64], dv_desc.layout)
        fence_async_shared()
        logs = Logs(x.scales, x.stride_scales, states.sums, sums_stride, states.chunk_log, states.entry_log)
        block = tile.h0 // S.HEADS
        BLOCKS: gl.constexpr = S.H // S.G // S.HEADS
        part = (block % BLOCKS).to(gl.int64) * all_tokens + tile.origin
        dk_tile = dk + part * (S.G * S.K) + block // BLOCKS * S.K
        ds = score_grads + (tile.chunk.to(gl.int64) * (S.H // S.HEADS) + block) * (64 * 64)
        next_ds = ds + (S.H // S.HEADS) * (64 * 64)
        tiles, results = Tiles(own, loaded, cleared, staged), Results(dv_desc, dv, dk_tile)
        gl.warp_specialize(
            [
                (gradients, (0, tiles, ring, factors, results, ds, gains, tile, all_tokens, S, GATED)),
                (gradients, (1, tiles, ring, factors, results, next_ds, gains, tile, all_tokens, S, GATED)),
                (write_factors, (factors, logs, tile, x.factor, L, S)),
                (load_tiles, (q_desc, k_desc, v_desc, do_desc, d_desc, own, loaded, ring, tile, S)),
            ],
            [4, 4, 1],
            [200, 88, 24],
        )  # fmt: skip
