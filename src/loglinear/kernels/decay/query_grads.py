"""QUERY GRADIENTS: dQ, and dλ of the levels above a chunk, by the same walk over the entries as the output."""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.levels import scales_of
from loglinear.kernels.tree.place import chunk_of, log2_of_power, lowbit, path_length, row_of_program
from loglinear.kernels.tree.tiles import load_entry, load_tokens, square, store_tile


@triton.jit
def entry_product(x, here, h, do_tile, entries, site, S: tl.constexpr):
    """``dO S_eᵀ`` ``[C, BK]``, over tiles of V where one tile does not hold it."""
    if S.V <= S.BV:
        state = load_entry(entries, site, 0, 0, S)
        product = tl.dot(do_tile, tl.trans(state), input_precision=S.PRECISION)
    elif S.V > 2 * S.BV:  # the loads of all tiles at once would not fit into shared memory
        product = tl.zeros([S.C, S.BK], tl.float32)
        for first_v in tl.range(0, S.V, S.BV):
            part = load_tokens(x.do, x.stride_do, h, here, S.C, S.V, S.BV, first_v)
            state = load_entry(entries, site, 0, first_v, S)
            product = tl.dot(part, tl.trans(state), acc=product, input_precision=S.PRECISION)
    else:
        product = tl.zeros([S.C, S.BK], tl.float32)
        for first_v in tl.static_range(0, S.V, S.BV):
            part = load_tokens(x.do, x.stride_do, h, here, S.C, S.V, S.BV, first_v)
            state = load_entry(entries, site, 0, first_v, S)
            product = tl.dot(part, tl.trans(state), acc=product, input_precision=S.PRECISION)
    return product


@triton.jit
def path_step(x, entry_log, at, here, e, h, L, S: tl.constexpr):
    """(λ ``[C]`` towards entry e, its log-decay), zero past the end of the path; loaded one step ahead of their use."""
    in_chunk = tl.arange(0, S.C)
    level = tl.minimum(log2_of_power(tl.maximum(lowbit(e), 1)) + S.LOG_C + 1, L - 1)
    inside = here.valid & (tl.zeros_like(in_chunk) + e > at.n0)
    pointers = scales_of(x, here, h, L) + (in_chunk * x.stride_scales + level)
    scale = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    return scale, tl.load(entry_log + (at.chunk0 - at.n0 + e - 1).to(tl.int64) * S.H + h, mask=e > at.n0, other=0.0)


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "L"])
def query_grads_kernel(
    x, L, states, score_grads, dq, dscales, gains, table, T, N, NG, all_tokens, sums_stride, S: tl.constexpr
):
    """dq ``[H / HEADS / G, B*T, G, K]``: float32 partial sums unless the first size is 1. Completes dλ.

    Completes the gains ``rows``, writes ``levels``: q·dq of a chunk through its entry of each level.
    Grid: H/HEADS x chunks, chunks fastest. float32: accumulators, dλ, weights.
    """
    BLOCKS: tl.constexpr = S.H // S.G // S.HEADS
    at, chunk, block, all_chunks = row_of_program(table, T, N, NG, S.H // S.HEADS, S)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    in_chunk = tl.arange(0, S.C)
    group_head = block // BLOCKS
    q_tile = load_tokens(x.q, x.stride_q, group_head, here, S.C, S.K, S.BK, 0)
    k_tile = load_tokens(x.k, x.stride_k, group_head, here, S.C, S.K, S.BK, 0)
    ds = tl.load(square(score_grads + (chunk.to(tl.int64) * (S.H // S.HEADS) + block) * (S.C * S.C), S.C))
    acc = tl.dot(ds, k_tile, input_precision=S.PRECISION)
    levels = tl.arange(0, S.LEVELS)
    steps = path_length(here.n, at.n0)
    for i in range(S.HEADS):
        h = block * S.HEADS + i
        row_gains = gains.rows + h.to(tl.int64) * all_tokens + here.origin + in_chunk
        place = dscales + here.origin * (S.H * L) + h * L + (in_chunk[:, None] * (S.H * L) + levels[None, :])
        head_sums = states.sums + h.to(tl.int64) * sums_stride + here.origin
        row_sums = tl.load(head_sums + in_chunk, mask=here.valid, other=0.0)
        scale, log = path_step(x, states.entry_log, at, here, here.n, h, L, S)
        if x.g is not None:
            row_part = tl.load(row_gains, mask=here.valid, other=0.0)
        do_tile = load_tokens(x.do, x.stride_do, h, here, S.C, S.V, S.BV, 0)
        gradient = tl.zeros([S.C, S.LEVELS], tl.float32)
        e = here.n
        since = 0.0
        for _ in range(steps):
            site = (at.chunk0 + e - 1 - at.n0).to(tl.int64) * S.H + h
            tree_level = log2_of_power(lowbit(e))
            level = tl.minimum(tree_level + S.LOG_C + 1, L - 1)
            decay = tl.exp2(row_sums + since)
            now = scale * x.factor
            since += log
            e = e & (e - 1)
            scale, log = path_step(x, states.entry_log, at, here, e, h, L, S)
            product = entry_product(x, here, h, do_tile, states.entries, site, S)
            gain = tl.sum(product * q_tile.to(tl.float32), axis=1) * decay
            acc += (now * decay)[:, None] * product
            gradient += tl.where(levels[None, :] == level, (gain * x.factor)[:, None], 0.0)
            if x.g is not None:
                row_part += gain * now
                level_place = (tree_level * S.H + h).to(tl.int64) * all_chunks + chunk
                tl.store(gains.levels + level_place, tl.sum(gain * now, axis=0))
        if L <= S.LOG_C + 1:  # the last level inside the chunk is that of all entries too
            inside = here.valid[:, None] & (levels < L)[None, :]
            gradient += tl.load(place, mask=inside, other=0.0).to(tl.float32)
            tl.store(place, gradient.to(dscales.dtype.element_ty), mask=inside)
        else:
            outside = here.valid[:, None] & ((levels > S.LOG_C) & (levels < L))[None, :]
            tl.store(place, gradient.to(dscales.dtype.element_ty), mask=outside)
        if x.g is not None:
            tl.store(row_gains, row_part, mask=here.valid)
    part = (block % BLOCKS).to(tl.int64) * all_tokens + here.origin
    target = dq + part * (S.G * S.K) + group_head * S.K
    store_tile(target, S.G * S.K, here.valid, acc, S.C, S.K, S.BK, 0)
