"""SPAN QUERY GRADIENTS: dq, dλ above a chunk and the gains of 128 queries, from their span and the entries before it.

For Hopper, in the place of ``decay/query_grads.py``. Where all pairs of a block have one level, the gradient of a query is a
factor of the query times a product, of dP and keys or of dO and an entry. These add up in the tensor cores. The gradient of λ
is a sum of dP times scores, or of dO times the product of q and the entry. Roles as in ``output.py``. ``own`` holds the halves
of Q, of K, and of K of the tile before.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from loglinear.kernels.decay.span.factors import Factors, Logs
from loglinear.kernels.decay.span.gains import ROWS, SUMS, Results, Sums, write_gains
from loglinear.kernels.decay.span.products import times, widened
from loglinear.kernels.decay.span.tile import (
    LEAST_ENTRY,
    TILE,
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

SLOTS = gl.constexpr(4)  # of the ring; queries and keys have memory of their own
COLUMNS = gl.constexpr(2)  # of keys: to the end of their chunk, of the tile before


@gluon.jit
def load_tiles(q_desc, k_desc, v_desc, do_desc, e_desc, own, loaded, ring, tile, S: gl.constexpr):
    """The role of one warp: queries and keys, then, head by head, dO, values and entries."""
    column = tile.h0 // (S.H // S.G) * S.K
    mbarrier.expect(loaded.index(0), 4 * TILE * 64 * 2)
    for half in gl.static_range(2):
        load_part(q_desc, [tile.origin, column + half * 64], loaded.index(0), own.index(half))
        load_part(k_desc, [tile.origin, column + half * 64], loaded.index(0), own.index(2 + half))
    if tile.second == 1:
        mbarrier.expect(loaded.index(1), 2 * TILE * 64 * 2)
        for half in gl.static_range(2):
            load_part(k_desc, [tile.origin - TILE, column + half * 64], loaded.index(1), own.index(4 + half))
    i = gl.to_tensor(0)
    for head in range(S.HEADS):
        h = tile.h0 + head
        i = put(do_desc, tile.origin, h * S.V, ring, i, TILE, SLOTS)
        i = put(v_desc, tile.origin, h * S.V, ring, i, TILE, SLOTS)
        if tile.second == 1:
            i = put(v_desc, tile.origin - TILE, h * S.V, ring, i, TILE, SLOTS)
        e = tile.path
        while e > 0:
            i = put(e_desc, (row_of(tile.chunk0 + e - 1, LEAST_ENTRY) * S.H + h) * S.K, 0, ring, i, TILE, SLOTS)
            e = e & (e - 1)


@gluon.jit
def row(factors, i, FIRST: gl.constexpr, layout: gl.constexpr):
    """Row factors i of 64 queries."""
    return factors.rows.index(i).slice(FIRST, 64).load(layout)


@gluon.jit
def add_keys(dq, do, values, queries, keys, column, weights, FIRST: gl.constexpr, KEYS: gl.constexpr):
    """(dq with that from 64 keys whose pairs have one level, row sums of ``dP ∘ Q Kᵀ``, both times the factors of the keys)."""
    left, right = dq
    ACC: gl.constexpr = left.type.layout
    zero = gl.zeros([64, 64], gl.float32, layout=ACC)
    left_keys, right_keys = keys[0].slice(KEYS, 64), keys[1].slice(KEYS, 64)
    dp = warpgroup_mma(do, values.slice(KEYS, 64).permute((1, 0)), zero, use_acc=False, is_async=True)
    scores = warpgroup_mma(queries[0].slice(FIRST, 64), left_keys.permute((1, 0)), zero, use_acc=False, is_async=True)
    scores = warpgroup_mma(queries[1].slice(FIRST, 64), right_keys.permute((1, 0)), scores, is_async=True)
    dp, scores = warpgroup_mma_wait(0, deps=(dp, scores))
    dp = dp * column[None, :]
    a = gl.convert_layout((dp * weights[:, None]).to(do.dtype), gl.DotOperandLayout(0, ACC, 2))
    left = warpgroup_mma(a, left_keys, left, is_async=True)
    right = warpgroup_mma(a, right_keys, right, is_async=True)
    found = gl.sum(dp * scores, axis=1)
    left, right, a = warpgroup_mma_wait(0, deps=(left, right, a))
    return (left, right), found


@gluon.jit
def add_entry(dq, do, entry, queries, weights, FIRST: gl.constexpr):
    """(dq with that from an entry, row sums of ``dO ∘ Q S``). weights are laid out as those of a register operand."""
    left, right = dq
    ACC: gl.constexpr = left.type.layout
    zero = gl.zeros([64, 64], gl.float32, layout=ACC)
    a = times(do, weights[:, None])
    part = warpgroup_mma(queries[0].slice(FIRST, 64), entry.slice(0, 64), zero, use_acc=False, is_async=True)
    part = warpgroup_mma(queries[1].slice(FIRST, 64), entry.slice(64, 64), part, is_async=True)
    left = warpgroup_mma(a, entry.slice(0, 64).permute((1, 0)), left, is_async=True)
    right = warpgroup_mma(a, entry.slice(64, 64).permute((1, 0)), right, is_async=True)
    part, left, right, a = warpgroup_mma_wait(0, deps=(part, left, right, a))
    return (left, right), gl.sum(widened(gl.convert_layout(do, ACC), part), axis=1)


@gluon.jit
def clear_absent(keys, tile, FIRST: gl.constexpr):
    """Zeros for the rows of ``keys [64, 64]``, a half of chunk FIRST / 64, where the sequence has no token.

    Other warps may read them meanwhile: for queries behind these keys, which are absent too.
    """
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    token = FIRST + gl.arange(0, 64, layout=gl.SliceLayout(1, BY_ROW))
    k = keys.load(BY_ROW)
    keys.store(gl.where((token < tile.size)[:, None], k, 0.0).to(k.dtype))
    fence_async_shared()


@gluon.jit
def gradients(P: gl.constexpr, own, loaded, ring, factors, sums, target, score_grads, tile, S: gl.constexpr):
    """The role of four warps: chunk P of the tile. target (dq) and score_grads point at what is the tile's and the chunk's."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    ROW_A: gl.constexpr = gl.SliceLayout(1, A)
    COLUMN: gl.constexpr = gl.SliceLayout(0, ACC)
    FIRST: gl.constexpr = P * 64
    zero = gl.zeros([64, 64], gl.float32, layout=ACC)
    s = gl.arange(0, 64, layout=gl.SliceLayout(0, A))[None, :]
    t = gl.arange(0, 64, layout=gl.SliceLayout(1, A))[:, None]
    a = gl.load(score_grads + t * 64 + s, mask=(t >= 0) & (s >= 0) & (tile.size > FIRST), other=0.0)
    mbarrier.wait(loaded.index(0), 0)
    if tile.second == 1:
        mbarrier.wait(loaded.index(1), 0)
    if tile.size < TILE:
        clear_absent(own.index(2).slice(FIRST, 64), tile, FIRST)
        clear_absent(own.index(3).slice(FIRST, 64), tile, FIRST)
    left = warpgroup_mma(a, own.index(2).slice(FIRST, 64), zero, use_acc=False, is_async=True)
    right = warpgroup_mma(a, own.index(3).slice(FIRST, 64), zero, use_acc=False, is_async=True)
    left, right, a = warpgroup_mma_wait(0, deps=(left, right, a))
    dq = left, right
    it = gl.to_tensor(0)
    for i in range(S.HEADS):
        slot, phase = slot_of(i, 2)
        here = hidden_zero()
        queries = own.index(here), own.index(here + 1)
        do = filled(ring, it, SLOTS).slice(FIRST, 64).load(A)
        fence_async_shared()  # else the next copy overtakes these loads
        it = emptied(ring, it, SLOTS)
        values = filled(ring, it, SLOTS)
        mbarrier.wait(factors.full.index(slot), phase)
        mbarrier.wait(sums.empty.index(slot), phase ^ 1)
        rows, columns, base = slot * ROWS, slot * COLUMNS, slot * SUMS
        if P == 1:
            keys = own.index(here + 2), own.index(here + 3)
            decays = row(factors, rows, FIRST, ROW)
            weights = decays * row(factors, rows + 1, FIRST, ROW)
            column = factors.columns.index(columns).slice(0, 64).load(COLUMN)
            dq, found = add_keys(dq, do, values, queries, keys, column, weights, FIRST, 0)
            sums.rows.index(base).slice(FIRST, 64).store(found * decays)
        it = emptied(ring, it, SLOTS)
        if tile.second == 1:
            values = filled(ring, it, SLOTS)
            keys = own.index(here + 4), own.index(here + 5)
            decays = row(factors, rows + 2, FIRST, ROW)
            weights = decays * row(factors, rows + 3, FIRST, ROW)
            column = factors.columns.index(columns + 1).slice(0, 64).load(COLUMN)
            dq, found = add_keys(dq, do, values, queries, keys, column, weights, FIRST, 0)
            column = factors.columns.index(columns + 1).slice(64, 64).load(COLUMN)
            dq, more = add_keys(dq, do, values, queries, keys, column, weights, FIRST, 64)
            it = emptied(ring, it, SLOTS)
            sums.rows.index(base + 1).slice(FIRST, 64).store((found + more) * decays)
        e = tile.path
        step = gl.to_tensor(2)
        here = hidden_zero()  # another one: else the assembler may take places made in the branch above for made
        queries = own.index(here), own.index(here + 1)
        while e > 0:
            entry = filled(ring, it, SLOTS)
            decays = row(factors, rows + 2 * step, FIRST, ROW)
            of_step = row(factors, rows + 2 * step, FIRST, ROW_A) * row(factors, rows + 2 * step + 1, FIRST, ROW_A)
            dq, found = add_entry(dq, do, entry, queries, of_step, FIRST)
            it = emptied(ring, it, SLOTS)
            sums.rows.index(base + step).slice(FIRST, 64).store(found * decays)
            step += 1
            e = e & (e - 1)
        mbarrier.arrive(factors.empty.index(slot), count=1)
        mbarrier.arrive(sums.full.index(slot), count=1)

    left, right = dq
    t = FIRST + gl.arange(0, 64, layout=ROW)[:, None]
    target += t * (S.G * S.K) + gl.arange(0, 64, layout=COLUMN)[None, :]
    gl.store(target, left.to(target.dtype.element_ty), mask=(t < tile.size) & (t >= 0))
    gl.store(target + 64, right.to(target.dtype.element_ty), mask=t < tile.size)


@gluon.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "all_chunks", "sums_stride", "L"])
def span_query_grads_kernel(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    e_desc,
    x,
    L,
    states,
    score_grads,
    dq,
    dscales,
    gains,
    table,
    T,
    N,
    NG,
    all_tokens,
    all_chunks,
    sums_stride,
    S: gl.constexpr,
):
    """The results of ``query_grads_kernel``, where λ has a level above those of a chunk.

    Grid: H/HEADS x octets x 4 tiles, tiles fastest. float32: accumulators, factors, sums; dP times decays is of v's dtype.
    """
    tile = tile_of_program(table, T, N, NG, S, LAST_FIRST=True)
    if tile.size > 0:
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        GATED: gl.constexpr = x.g is not None
        own = gl.allocate_shared_memory(v_desc.dtype, [6, 128, 64], v_desc.layout)
        loaded = barriers(2, 1)
        slots = gl.allocate_shared_memory(v_desc.dtype, [SLOTS, 128, 64], v_desc.layout)
        ring = Ring(slots, barriers(SLOTS, 1), barriers(SLOTS, 2))
        rows = gl.allocate_shared_memory(gl.float32, [2 * ROWS, 128], FLAT)
        columns = gl.allocate_shared_memory(gl.float32, [2 * COLUMNS, 128], FLAT)
        factors = Factors(rows, columns, None, barriers(2, 1), barriers(2, 2))
        sums = Sums(gl.allocate_shared_memory(gl.float32, [2 * SUMS, 128], FLAT), barriers(2, 2), barriers(2, 1))
        fence_async_shared()
        logs = Logs(x.scales, x.stride_scales, states.sums, sums_stride, states.chunk_log, states.entry_log)
        results = Results(dscales, gains.rows, gains.levels, all_tokens, all_chunks)
        block = tile.h0 // S.HEADS
        BLOCKS: gl.constexpr = S.H // S.G // S.HEADS
        part = (block % BLOCKS).to(gl.int64) * all_tokens + tile.origin
        dq_tile = dq + part * (S.G * S.K) + block // BLOCKS * S.K
        ds = score_grads + (tile.chunk.to(gl.int64) * (S.H // S.HEADS) + block) * (64 * 64)
        next_ds = ds + (S.H // S.HEADS) * (64 * 64)
        gl.warp_specialize(
            [
                (gradients, (0, own, loaded, ring, factors, sums, dq_tile, ds, tile, S)),
                (gradients, (1, own, loaded, ring, factors, sums, dq_tile, next_ds, tile, S)),
                (write_gains, (factors, sums, logs, results, tile, x.factor, L, S, GATED)),
                (load_tiles, (q_desc, k_desc, v_desc, do_desc, e_desc, own, loaded, ring, tile, S)),
            ],
            [4, 4, 1],
            [184, 120, 24],
        )
