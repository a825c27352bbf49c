"""PATH GRADIENTS: the walk of every chunk back over its query path, from the oldest entry to the nearest.

Each state before the group, as seen from its start, gave ``O += λ ∘ (Q S)``, so ``dO Sᵀ`` gives dλ, and its sum over
the states gives dQ. An entry (A, S) within the group also gave ``Q' = Q A``: with dQ' known, ``dQ' Aᵀ`` is the other
part of dQ, and this dQ is dQ' of the entry before. The last entry may be a leaf (see leaf.py). The remainder at the end
is the gradient of the queries as seen from the start of their chunk. Every dQ' is kept for the gradients of the
entries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.delta.group_maps import decay_to_end, map_tile
from loglinear.kernels.delta.leaf import leaf_scores
from loglinear.kernels.delta.path_queries import inner_start
from loglinear.kernels.delta.path_states import path_start
from loglinear.kernels.delta.products import times_tokens, times_transposed
from loglinear.kernels.delta.tiles import load_part, load_part_if, store_part
from loglinear.kernels.tree.place import GROUP, bit_length, locate, log2_of_power, lowbit, set_bits
from loglinear.kernels.tree.tiles import load_tile


@triton.jit
def entry_product(do_head, stride_do, valid, entry, S: tl.constexpr):
    """``dO Sᵀ`` ``[C, BK]`` of an entry ``[A | S]``, over tiles of V."""
    product = tl.zeros([S.C, S.BK], tl.float32)
    for first in range(0, S.V, S.BV):
        do_tile = load_tile(do_head, stride_do, valid, S.C, S.V, S.BV, first)
        pointers, inside = map_tile(entry + S.K, first, 0, S.V, S.K + S.V, S.K, S.BK, S.BV)
        if S.K % S.BK == 0 and S.V % S.BV == 0:
            state = tl.load(pointers)
        else:
            state = tl.load(pointers, mask=inside, other=0.0)
        product = tl.dot(do_tile, tl.trans(state), product, input_precision=S.PRECISION)
    return product


@triton.jit
def state_gradient(product, queries, scales, valid, tree_level, L, LEVELS: tl.constexpr, x, S: tl.constexpr):
    """(share of dQ, of dλ ``[C, LEVELS]``) of a state of 2^tree_level chunks, from ``product = dO Sᵀ`` and the queries."""
    level = tl.minimum(tree_level + S.LOG_C + 1, L - 1)
    scale = (
        tl.load(scales + (tl.arange(0, S.C) * x.stride_scales + level), mask=valid, other=0.0).to(tl.float32) * x.factor
    )
    gain = tl.sum(product * queries.to(tl.float32), axis=1) * x.factor
    return scale[:, None] * product, tl.where(tl.arange(0, LEVELS)[None, :] == level, gain[:, None], 0.0)


@triton.jit
def leaf_gradient(
    acc,
    queries,
    grads,
    followed,
    do_head,
    valid,
    keys,
    sums,
    plane,
    written,
    scales,
    L,
    LEVELS: tl.constexpr,
    x,
    S: tl.constexpr,
):
    """(dQ, dλ) past the entry of one chunk, whose keys, sums and ``[W | U]`` are given; acc is the gradient after it.

    ``(λ ∘ dO) Uᵀ - dQ' Wᵀ`` is the gradient of ``G = Q K_endᵀ``.
    """
    after = acc.to(grads.dtype.element_ty)
    if followed:  # another entry follows
        store_part(grads, after, 0, 0, S.K, S.C, S.K, S.C, S.BK)
    everywhere = tl.arange(0, S.C) >= 0
    outer = tl.zeros([S.C, S.C], tl.float32)
    for first in range(0, S.V, S.BV):
        do_tile = load_tile(do_head, x.stride_do, valid, S.C, S.V, S.BV, first)
        added = load_tile(written + S.K, S.K + S.V, everywhere, S.C, S.V, S.BV, first)
        outer = tl.dot(do_tile, tl.trans(added), outer, input_precision=S.PRECISION)
    pairs = leaf_scores(load_part(queries, 0, 0, S.K, S.C, S.K, S.C, S.BK), keys, x.stride_k, sums, plane, S)
    share, gain = state_gradient(outer, pairs, scales, valid, 0, L, LEVELS, x, S)
    share -= times_tokens(after, written, S.K + S.V, everywhere, S)
    share = (share * decay_to_end(sums, S.C, plane, S)[None, :]).to(after.dtype)
    acc = acc * tl.exp2(tl.load(sums + S.C - 1))
    return tl.dot(
        share, load_tile(keys, x.stride_k, everywhere, S.C, S.K, S.BK, 0), acc, input_precision=S.PRECISION
    ), gain


@triton.jit(do_not_specialize=["T", "N", "NG", "paths", "all_tokens", "sums_stride", "L"])
def path_grads_kernel(
    x,
    L,
    maps,
    states,  # [slots, H, K, K+V], as path_states leaves them
    inner_queries,  # [1.5 rows, H, C, K] queries before each entry within their group
    group_queries,  # [rows, H, C, K] queries as seen from the start of their group
    inner_grads,  # [1.5 rows, H, C, K] gradient of the queries after it; none for the last entry of all, where it is zero
    query_grads,  # [rows, H, C, K] gradient of the queries as seen from the start of their chunk
    out,
    path_starts,
    table,
    T,
    N,
    NG,
    paths,
    all_tokens,
    sums_stride,
    S: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Grid: H x rows, rows fastest. float32: accumulators, dλ. The gradient is rounded before each product with A."""
    SIZE: tl.constexpr = S.K * (S.K + S.V)
    rows = tl.num_programs(0) // S.H
    pid = tl.program_id(0)
    row = pid % rows
    h = pid // rows
    start, length, row0, _, _, sequence = locate(row, table, T, N, NG, N, S.PACKED)
    if length < 0:
        return
    n = row - row0
    m = n // GROUP
    in_chunk = tl.arange(0, S.C)
    valid = in_chunk < length - n * S.C
    origin = (start + n * S.C).to(tl.int64)
    unit = row.to(tl.int64) * S.H + h
    scales = x.scales + origin * x.stride_scales + h * L
    do_head = x.do + origin * x.stride_do + h * S.V
    dtype = inner_grads.dtype.element_ty
    gradient = tl.zeros([S.C, LEVELS], tl.float32)
    acc = tl.zeros([S.C, S.BK], tl.float32)

    slot = path_start(m, sequence, path_starts, paths, S.PACKED)
    nearest = maps.entries + ((row0 + m * GROUP - 1).to(tl.int64) * S.HEADS + h) * SIZE
    queries = load_part_if(m > 0, group_queries + unit * (S.C * S.K), 0, 0, S.K, S.C, S.K, S.C, S.BK)
    rest = n - n % GROUP
    # One state arrives while the state before is multiplied. Two maps of the next loop would leave no room for this.
    for j in tl.range(set_bits(m), num_stages=2):
        source = tl.where(j > 0, states + ((slot + j).to(tl.int64) * S.H + h) * SIZE, nearest)
        product = entry_product(do_head, x.stride_do, valid, source, S)
        tree_level = log2_of_power(lowbit(rest))
        share, gain = state_gradient(product, queries, scales, valid, tree_level, L, LEVELS, x, S)
        acc += share
        gradient += gain
        rest &= rest - 1

    rest = n % GROUP
    slot = inner_start(n, row0) + set_bits(rest)
    for i in range(set_bits(rest // 2)):
        slot -= 1
        place = (slot.to(tl.int64) * S.H + h) * (S.C * S.K)
        tree_level = bit_length(rest) - 1
        rest -= 1 << tree_level
        entry = maps.entries + ((row0 + n - rest - 1).to(tl.int64) * S.HEADS + h) * SIZE
        if (i > 0) | (m > 0):
            after = acc.to(dtype)
            store_part(inner_grads + place, after, 0, 0, S.K, S.C, S.K, S.C, S.BK)
            acc = times_transposed(after, entry, S.K + S.V, S.C, S)
        product = entry_product(do_head, x.stride_do, valid, entry, S)
        queries = load_part(inner_queries + place, 0, 0, S.K, S.C, S.K, S.C, S.BK)
        share, gain = state_gradient(product, queries, scales, valid, tree_level, L, LEVELS, x, S)
        acc += share
        gradient += gain
    if n % 2 == 1:
        place = ((slot - 1).to(tl.int64) * S.H + h) * (S.C * S.K)
        before_k = x.k + (origin - S.C) * x.stride_k + h // (S.H // S.G) * S.K
        before_sums = maps.sums + h.to(tl.int64) * sums_stride + (origin - S.C)
        written = maps.writes + ((row - 1).to(tl.int64) * S.HEADS + h) * (S.C * (S.K + S.V))
        acc, gain = leaf_gradient(
            acc,
            inner_queries + place,
            inner_grads + place,
            n > 1,
            do_head,
            valid,
            before_k,
            before_sums,
            all_tokens,
            written,
            scales,
            L,
            LEVELS,
            x,
            S,
        )
        gradient += gain
    store_part(query_grads + unit * (S.C * S.K), acc, 0, 0, S.K, S.C, S.K, S.C, S.BK)
    columns = tl.arange(0, LEVELS)[None, :]
    place = out.dscales + origin * out.stride_dscales + h * L + (in_chunk[:, None] * out.stride_dscales + columns)
    tl.store(place, gradient.to(out.dscales.dtype.element_ty), mask=valid[:, None] & (columns < L))
