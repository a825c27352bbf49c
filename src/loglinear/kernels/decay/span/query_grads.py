"""SPAN QUERY GRADIENTS: dq, dλ and the gains of the rows of a tile of 128 queries, over its span and the entries before it.

For Hopper, in the place of ``decay/local_grads.py`` and ``decay/query_grads.py``. Where all pairs of a block have one level,
the gradient of a query is a factor of the query times a product, of dP and keys or of dO and an entry. The product times q
is the gradient of λ, so scores are needed inside a chunk only. Roles as in ``output.py``.
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

from loglinear.kernels.decay.span.factors import COLUMNS, Factors, Logs, decay
from loglinear.kernels.decay.span.gains import ENDS, LAMBDA, ROWS, STEPS, SUMS, Results, Sums, write_gains
from loglinear.kernels.decay.span.products import unpacked_times
from loglinear.kernels.decay.span.tile import (
    TILE,
    Ring,
    barriers,
    emptied,
    filled,
    load_part,
    put,
    slot_of,
    tile_of_program,
)

SLOTS = gl.constexpr(4)  # of the ring; queries and keys have memory of their own


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
            i = put(e_desc, ((tile.chunk0 + e - 1) * S.H + h) * S.K, 0, ring, i, TILE, SLOTS)
            e = e & (e - 1)


@gluon.jit
def own_scores(own, FIRST: gl.constexpr, COUNT: gl.constexpr, J: gl.constexpr, dtype: gl.constexpr):
    """Scores ``[64, COUNT]`` of a chunk's queries with sub-block J of its keys, rounded."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COUNT, 16])
    scores = gl.zeros([64, COUNT], gl.float32, layout=ACC)
    for half in gl.static_range(2):
        keys = own.index(2 + half).slice(FIRST + J * COUNT, COUNT).permute((1, 0))
        scores = warpgroup_mma(own.index(half).slice(FIRST, 64), keys, scores, use_acc=half > 0, is_async=True)
    return warpgroup_mma_wait(0, deps=(scores,)).to(dtype)


@gluon.jit
def outer(do, values, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """``dO Vᵀ`` ``[64, COUNT]`` for COUNT keys from FIRST on, under way; dO is a register operand."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COUNT, 16])
    zero = gl.zeros([64, COUNT], gl.float32, layout=ACC)
    operand = gl.convert_layout(do, gl.DotOperandLayout(0, ACC, 2))
    return warpgroup_mma(operand, values.slice(FIRST, COUNT).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def present_pairs(dp, tile, P: gl.constexpr, J: gl.constexpr):
    """dP or scores ``[64, 16]`` of sub-block J, zero where the query or the key is absent."""
    t = P * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, dp.type.layout))
    s = P * 64 + J * 16 + gl.arange(0, 16, layout=gl.SliceLayout(0, dp.type.layout))
    return gl.where((t < tile.size)[:, None] & (s < tile.size)[None, :], dp, 0.0).to(dp.dtype)


@gluon.jit
def row(factors, i, FIRST: gl.constexpr, layout: gl.constexpr):
    """Row factors i of 64 queries."""
    return factors.rows.index(i).slice(FIRST, 64).load(layout)


@gluon.jit
def near_block(factors, rows, FIRST: gl.constexpr, ACC: gl.constexpr):
    """(decay, λ · decay) ``[64, 16]`` of each query in its own sub-block, zero above the diagonal."""
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    COLUMN: gl.constexpr = gl.SliceLayout(0, ACC)
    r = gl.arange(0, 64, layout=ROW)[:, None]
    c = gl.arange(0, 16, layout=COLUMN)[None, :]
    block, apart = r // 16, (r % 16) ^ c
    sums = factors.rows.index(rows)
    near = gl.where(
        block < 2,
        gl.where(
            block == 0, sums.slice(FIRST, 16).load(COLUMN)[None, :], sums.slice(FIRST + 16, 16).load(COLUMN)[None, :]
        ),
        gl.where(
            block == 2,
            sums.slice(FIRST + 32, 16).load(COLUMN)[None, :],
            sums.slice(FIRST + 48, 16).load(COLUMN)[None, :],
        ),
    )
    near = gl.where(c <= r % 16, decay(row(factors, rows, FIRST, ROW)[:, None] - near), 0.0)
    scales = gl.where(
        apart == 0,
        row(factors, rows + LAMBDA, FIRST, ROW)[:, None],
        row(factors, rows + LAMBDA + 1, FIRST, ROW)[:, None],
    )
    scales = gl.where(apart >= 2, row(factors, rows + LAMBDA + 2, FIRST, ROW)[:, None], scales)
    scales = gl.where(apart >= 4, row(factors, rows + LAMBDA + 3, FIRST, ROW)[:, None], scales)
    scales = gl.where(apart >= 8, row(factors, rows + LAMBDA + 4, FIRST, ROW)[:, None], scales)
    return near, near * scales


@gluon.jit
def sub_block(scores, dp, near, near_weights, factors, rows, columns, gains, tile, P: gl.constexpr, J: gl.constexpr,
              GATED: gl.constexpr):  # fmt: skip
    """(score · dP · decay, λ · decay · dP) ``[64, 16]`` of a chunk's queries with sub-block J of its keys.

    Stores the gains of these keys; ``gains`` points at those of the tile's first key.
    """
    ACC: gl.constexpr = dp.type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    FIRST: gl.constexpr = P * 64
    r = gl.arange(0, 64, layout=ROW)
    c = gl.arange(0, 16, layout=gl.SliceLayout(0, ACC))
    block = r // 16
    if J < 3:
        l5 = row(factors, rows + LAMBDA + 5, FIRST, ROW)
        l6 = row(factors, rows + LAMBDA + 6, FIRST, ROW)
        scale = gl.where((block ^ J) == 1, l5, l6)
        far = row(factors, rows + ENDS + J, FIRST, ROW)
        column = factors.columns.index(columns).slice(FIRST + J * 16, 16).load(gl.SliceLayout(0, ACC))
        decays = gl.where(block[:, None] == J, near, far[:, None] * column[None, :])
        weights = gl.where(block[:, None] == J, near_weights, (far * scale)[:, None] * column[None, :])
    else:
        decays = gl.where(block[:, None] == J, near, 0.0)
        weights = gl.where(block[:, None] == J, near_weights, 0.0)
    pairs = unpacked_times(scores, dp)
    if GATED:
        apart = gl.where(r[:, None] == (J * 16 + c)[None, :], 0.0, pairs * weights)
        key = FIRST + J * 16 + c
        gl.store(gains + key, gl.sum(apart, axis=0), mask=key < tile.size)
    return pairs * decays, weights * dp


@gluon.jit
def own_chunk(scores, dp, grads, factors, sums, slot, gains, tile, P: gl.constexpr, GATED: gl.constexpr):
    """Adds a head to the gradients of the scores ``[64, 16]`` of the four sub-blocks; stores the sums of levels 0 … 6."""
    ACC: gl.constexpr = dp[0].type.layout
    FIRST: gl.constexpr = P * 64
    rows, columns, base = slot * ROWS, slot * COLUMNS, slot * SUMS
    block = gl.arange(0, 64, layout=gl.SliceLayout(1, ACC)) // 16
    here = block[:, None]
    near, weights = near_block(factors, rows, FIRST, ACC)
    p, d = sub_block(scores[0], dp[0], near, weights, factors, rows, columns, gains, tile, P, 0, GATED)
    ds0 = grads[0] + d
    own = gl.where(here == 0, p, 0.0)
    far = gl.where(here > 0, p, 0.0)
    p, d = sub_block(scores[1], dp[1], near, weights, factors, rows, columns, gains, tile, P, 1, GATED)
    ds1 = grads[1] + d
    own = gl.where(here == 1, p, own)
    far += gl.where(here > 1, p, 0.0)
    p, d = sub_block(scores[2], dp[2], near, weights, factors, rows, columns, gains, tile, P, 2, GATED)
    ds2 = grads[2] + d
    own = gl.where(here == 2, p, own)
    third = gl.sum(gl.where(here > 2, p, 0.0), axis=1)
    p, d = sub_block(scores[3], dp[3], near, weights, factors, rows, columns, gains, tile, P, 3, GATED)
    ds3 = grads[3] + d
    own = gl.where(here == 3, p, own)
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))[:, None]
    apart = (r % 16) ^ gl.arange(0, 16, layout=gl.SliceLayout(0, ACC))[None, :]
    target = sums.rows
    target.index(base).slice(FIRST, 64).store(gl.sum(gl.where(apart == 0, own, 0.0), axis=1))
    target.index(base + 1).slice(FIRST, 64).store(gl.sum(gl.where(apart == 1, own, 0.0), axis=1))
    target.index(base + 2).slice(FIRST, 64).store(gl.sum(gl.where(apart // 2 == 1, own, 0.0), axis=1))
    target.index(base + 3).slice(FIRST, 64).store(gl.sum(gl.where(apart // 4 == 1, own, 0.0), axis=1))
    target.index(base + 4).slice(FIRST, 64).store(gl.sum(gl.where(apart // 8 == 1, own, 0.0), axis=1))
    far = gl.sum(far, axis=1)
    target.index(base + 5).slice(FIRST, 64).store(gl.where(block == 1, far, third))
    target.index(base + 6).slice(FIRST, 64).store(gl.where(block >= 2, far, 0.0))
    return ds0, ds1, ds2, ds3


@gluon.jit
def product_sum(product, queries):
    """Row sums of ``product ∘ Q`` for half of the columns, ``[64, 64]`` both."""
    return gl.sum(product * queries.load(product.type.layout).to(gl.float32), axis=1)


@gluon.jit
def operand_of(dp, column, dtype: gl.constexpr):
    """dP times a factor of the key, as a register operand."""
    return gl.convert_layout((dp * column[None, :]).to(dtype), gl.DotOperandLayout(0, dp.type.layout, 2))


@gluon.jit
def gradients(P: gl.constexpr, own, loaded, ring, factors, sums, dq, score_grads, gains, tile, tokens, S: gl.constexpr,
              GATED: gl.constexpr):  # fmt: skip
    """The role of four warps: chunk P of the tile. dq, score_grads and gains point at what belongs to the program's tile."""
    NARROW: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    COLUMN: gl.constexpr = gl.SliceLayout(0, ACC)
    FIRST: gl.constexpr = P * 64
    dtype: gl.constexpr = ring.slots.dtype
    zero = gl.zeros([64, 64], gl.float32, layout=ACC)
    mbarrier.wait(loaded.index(0), 0)
    if tile.second == 1:
        mbarrier.wait(loaded.index(1), 0)
    s0 = own_scores(own, FIRST, 16, 0, dtype)
    s1 = own_scores(own, FIRST, 16, 1, dtype)
    s2 = own_scores(own, FIRST, 16, 2, dtype)
    s3 = own_scores(own, FIRST, 16, 3, dtype)
    if tile.size < TILE:
        s0, s1 = present_pairs(s0, tile, P, 0), present_pairs(s1, tile, P, 1)
        s2, s3 = present_pairs(s2, tile, P, 2), present_pairs(s3, tile, P, 3)
    ds0 = gl.zeros([64, 16], gl.float32, layout=NARROW)
    ds1 = gl.zeros([64, 16], gl.float32, layout=NARROW)
    ds2 = gl.zeros([64, 16], gl.float32, layout=NARROW)
    ds3 = gl.zeros([64, 16], gl.float32, layout=NARROW)
    left, right = zero, zero
    it = gl.to_tensor(0)
    for i in range(S.HEADS):
        slot, phase = slot_of(i, 2)
        do = filled(ring, it, SLOTS).slice(FIRST, 64).load(A)
        it = emptied(ring, it, SLOTS)
        values = filled(ring, it, SLOTS)
        dp0, dp1 = outer(do, values, FIRST, 16), outer(do, values, FIRST + 16, 16)
        dp2, dp3 = outer(do, values, FIRST + 32, 16), outer(do, values, FIRST + 48, 16)
        mbarrier.wait(factors.full.index(slot), phase)
        mbarrier.wait(sums.empty.index(slot), phase ^ 1)
        rows, columns, base = slot * ROWS, slot * COLUMNS, slot * SUMS
        dp0, dp1, dp2, dp3, do = warpgroup_mma_wait(0, deps=(dp0, dp1, dp2, dp3, do))
        if tile.size < TILE:
            dp0, dp1 = present_pairs(dp0, tile, P, 0), present_pairs(dp1, tile, P, 1)
            dp2, dp3 = present_pairs(dp2, tile, P, 2), present_pairs(dp3, tile, P, 3)
        at = gains + (tile.h0 + i).to(gl.int64) * tokens
        ds0, ds1, ds2, ds3 = own_chunk(
            (s0, s1, s2, s3), (dp0, dp1, dp2, dp3), (ds0, ds1, ds2, ds3), factors, sums, slot, at, tile, P, GATED
        )
        if P == 1:
            dp = warpgroup_mma_wait(0, deps=(outer(do, values, 0, 64),))
            a = operand_of(dp, factors.columns.index(columns + 1).slice(0, 64).load(COLUMN), dtype)
            decays = row(factors, rows + STEPS, FIRST, ROW)
            weights = decays * row(factors, rows + STEPS + 1, FIRST, ROW)
            part = warpgroup_mma(a, own.index(2).slice(0, 64), zero, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=(part,))
            found = product_sum(part, own.index(0).slice(FIRST, 64))
            left += weights[:, None] * part
            part = warpgroup_mma(a, own.index(3).slice(0, 64), zero, use_acc=False, is_async=True)
            part, a = warpgroup_mma_wait(0, deps=(part, a))
            found += product_sum(part, own.index(1).slice(FIRST, 64))
            right += weights[:, None] * part
            sums.rows.index(base + 7).slice(FIRST, 64).store(found * decays)
        it = emptied(ring, it, SLOTS)
        if tile.second == 1:
            values = filled(ring, it, SLOTS)
            dp = warpgroup_mma_wait(0, deps=(outer(do, values, 0, 64),))
            a = operand_of(dp, factors.columns.index(columns + 2).slice(0, 64).load(COLUMN), dtype)
            dp = warpgroup_mma_wait(0, deps=(outer(do, values, 64, 64),))
            b = operand_of(dp, factors.columns.index(columns + 2).slice(64, 64).load(COLUMN), dtype)
            it = emptied(ring, it, SLOTS)
            decays = row(factors, rows + STEPS + 2, FIRST, ROW)
            weights = decays * row(factors, rows + STEPS + 3, FIRST, ROW)
            part = warpgroup_mma(a, own.index(4).slice(0, 64), zero, use_acc=False, is_async=True)
            part = warpgroup_mma(b, own.index(4).slice(64, 64), part, is_async=True)
            part = warpgroup_mma_wait(0, deps=(part,))
            found = product_sum(part, own.index(0).slice(FIRST, 64))
            left += weights[:, None] * part
            part = warpgroup_mma(a, own.index(5).slice(0, 64), zero, use_acc=False, is_async=True)
            part = warpgroup_mma(b, own.index(5).slice(64, 64), part, is_async=True)
            part, a, b = warpgroup_mma_wait(0, deps=(part, a, b))
            found += product_sum(part, own.index(1).slice(FIRST, 64))
            right += weights[:, None] * part
            sums.rows.index(base + 8).slice(FIRST, 64).store(found * decays)
        e = tile.path
        step = gl.to_tensor(0)
        while e > 0:
            entry = filled(ring, it, SLOTS)
            decays = row(factors, rows + STEPS + 4 + 2 * step, FIRST, ROW)
            weights = decays * row(factors, rows + STEPS + 5 + 2 * step, FIRST, ROW)
            part = warpgroup_mma(do, entry.slice(0, 64).permute((1, 0)), zero, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=(part,))
            found = product_sum(part, own.index(0).slice(FIRST, 64))
            left += weights[:, None] * part
            part = warpgroup_mma(do, entry.slice(64, 64).permute((1, 0)), zero, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=(part,))
            it = emptied(ring, it, SLOTS)
            found += product_sum(part, own.index(1).slice(FIRST, 64))
            right += weights[:, None] * part
            sums.rows.index(base + 9 + step).slice(FIRST, 64).store(found * decays)
            step += 1
            e = e & (e - 1)
        mbarrier.arrive(factors.empty.index(slot), count=1)
        mbarrier.arrive(sums.full.index(slot), count=1)

    a0, a1 = gl.convert_layout(ds0.to(dtype), A), gl.convert_layout(ds1.to(dtype), A)
    a2, a3 = gl.convert_layout(ds2.to(dtype), A), gl.convert_layout(ds3.to(dtype), A)
    t = gl.arange(0, 64, layout=gl.SliceLayout(1, A))[:, None]
    s = gl.arange(0, 16, layout=gl.SliceLayout(0, A))[None, :]
    there = (t >= 0) & (s >= 0) & (tile.size > FIRST)
    target = score_grads + t * 64 + s
    gl.store(target, a0, mask=there)
    gl.store(target + 16, a1, mask=there)
    gl.store(target + 32, a2, mask=there)
    gl.store(target + 48, a3, mask=there)
    left = own_product(own, 0, a0, a1, a2, a3, left, tile, P)
    right = own_product(own, 1, a0, a1, a2, a3, right, tile, P)
    t = FIRST + gl.arange(0, 64, layout=ROW)[:, None]
    target = dq + t * (S.G * S.K) + gl.arange(0, 64, layout=COLUMN)[None, :]
    gl.store(target, left.to(dq.dtype.element_ty), mask=(t < tile.size) & (t >= 0))
    gl.store(target + 64, right.to(dq.dtype.element_ty), mask=t < tile.size)


@gluon.jit
def own_product(own, HALF: gl.constexpr, a0, a1, a2, a3, acc, tile, P: gl.constexpr):
    """acc plus the gradient of the scores of chunk P times its keys, half of their columns. Absent keys count as zero.

    The keys are copied to where the queries were, which no other warps read.
    """
    BY_ROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    token = P * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, BY_ROW))
    k = own.index(2 + HALF).slice(P * 64, 64).load(BY_ROW)
    keys = own.index(HALF).slice(P * 64, 64)
    keys.store(gl.where((token < tile.size)[:, None], k, 0.0).to(k.dtype))
    fence_async_shared()
    acc = warpgroup_mma(a0, keys.slice(0, 16), acc, is_async=True)
    acc = warpgroup_mma(a1, keys.slice(16, 16), acc, is_async=True)
    acc = warpgroup_mma(a2, keys.slice(32, 16), acc, is_async=True)
    acc = warpgroup_mma(a3, keys.slice(48, 16), acc, is_async=True)
    return warpgroup_mma_wait(0, deps=(acc,))


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
    LOCAL: gl.constexpr,
):
    """The results of ``local_grads_kernel`` and ``query_grads_kernel``. Grid: H/HEADS x octets x 4 tiles, tiles fastest.

    float32: accumulators, factors, sums; scores, dP times decays, and dS are of v's dtype.
    """
    tile = tile_of_program(table, T, N, NG, S)
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
        keys = gains.columns + tile.origin
        gl.warp_specialize(
            [
                (gradients, (0, own, loaded, ring, factors, sums, dq_tile, ds, keys, tile, all_tokens, S, GATED)),
                (gradients, (1, own, loaded, ring, factors, sums, dq_tile, next_ds, keys, tile, all_tokens, S, GATED)),
                (write_gains, (factors, sums, logs, results, tile, x.factor, L, S, LOCAL, GATED)),
                (load_tiles, (q_desc, k_desc, v_desc, do_desc, e_desc, own, loaded, ring, tile, S)),
            ],
            [4, 4, 1],
            [208, 72, 24],
        )
