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
def entry_product(do_head, stride_do, valid, entry, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                  BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``dO Sᵀ`` ``[C, BK]`` of an entry ``[A | S]``, over tiles of V."""
    product = tl.zeros([C, BK], tl.float32)
    for first in range(0, V, BV):
        do_tile = load_tile(do_head, stride_do, valid, C, V, BV, first)
        pointers, inside = map_tile(entry + K, first, 0, V, K + V, K, BK, BV)
        if K % BK == 0 and V % BV == 0:
            state = tl.load(pointers)
        else:
            state = tl.load(pointers, mask=inside, other=0.0)
        product = tl.dot(do_tile, tl.trans(state), product, input_precision=PRECISION)
    return product


@triton.jit
def state_gradient(product, queries, scales, stride, valid, tree_level, factor, L, LOG_C: tl.constexpr, C: tl.constexpr,
                   LEVELS: tl.constexpr):  # fmt: skip
    """(share of dQ, of dλ ``[C, LEVELS]``) of a state of 2^tree_level chunks, from ``product = dO Sᵀ`` and the queries."""
    level = tl.minimum(tree_level + LOG_C + 1, L - 1)
    scale = tl.load(scales + (tl.arange(0, C) * stride + level), mask=valid, other=0.0).to(tl.float32) * factor
    gain = tl.sum(product * queries.to(tl.float32), axis=1) * factor
    return scale[:, None] * product, tl.where(tl.arange(0, LEVELS)[None, :] == level, gain[:, None], 0.0)


@triton.jit
def leaf_gradient(acc, queries, grads, followed, do_head, stride_do, valid, keys, stride_k, sums, plane, written, scales,
                  stride, factor, L, LOG_C: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                  BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """(dQ, dλ) past the entry of one chunk, whose keys, sums and ``[W | U]`` are given; acc is the gradient after it.

    ``(λ ∘ dO) Uᵀ - dQ' Wᵀ`` is the gradient of ``G = Q K_endᵀ``.
    """
    after = acc.to(grads.dtype.element_ty)
    if followed:  # another entry follows
        store_part(grads, after, 0, 0, K, C, K, C, BK)
    everywhere = tl.arange(0, C) >= 0
    outer = tl.zeros([C, C], tl.float32)
    for first in range(0, V, BV):
        do_tile = load_tile(do_head, stride_do, valid, C, V, BV, first)
        added = load_tile(written + K, K + V, everywhere, C, V, BV, first)
        outer = tl.dot(do_tile, tl.trans(added), outer, input_precision=PRECISION)
    pairs = leaf_scores(
        load_part(queries, 0, 0, K, C, K, C, BK), keys, stride_k, sums, plane, C, K, BK, EXACT, PRECISION
    )
    share, gain = state_gradient(outer, pairs, scales, stride, valid, 0, factor, L, LOG_C, C, LEVELS)
    share -= times_tokens(after, written, K + V, everywhere, C, K, BK, PRECISION)
    share = (share * decay_to_end(sums, C, plane, C, EXACT)[None, :]).to(after.dtype)
    acc = acc * tl.exp2(tl.load(sums + C - 1))
    return tl.dot(share, load_tile(keys, stride_k, everywhere, C, K, BK, 0), acc, input_precision=PRECISION), gain


@triton.jit(do_not_specialize=["T", "N", "NG", "paths", "all_tokens", "sums_stride", "L"])
def path_grads_kernel(
    k,
    do,
    level_scales,
    sums,
    writes,
    entries,
    states,  # [slots, H, K, K+V], as path_states leaves them
    inner_queries,  # [1.5 rows, H, C, K] queries before each entry within their group
    group_queries,  # [rows, H, C, K] queries as seen from the start of their group
    inner_grads,  # [1.5 rows, H, C, K] gradient of the queries after it; none for the last entry of all, where it is zero
    query_grads,  # [rows, H, C, K] gradient of the queries as seen from the start of their chunk
    dlevel_scales,
    path_starts,
    row_sequence,
    sequences,
    T,
    N,
    NG,
    paths,
    all_tokens,
    sums_stride,
    stride_k,
    stride_do,
    stride_s,
    stride_ds,
    factor,
    L,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LOG_C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    LEVELS: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: H x rows, rows fastest. float32: accumulators, dλ. The gradient is rounded before each product with A."""
    SIZE: tl.constexpr = K * (K + V)
    rows = tl.num_programs(0) // H
    pid = tl.program_id(0)
    row = pid % rows
    h = pid // rows
    start, length, row0, _, _, sequence = locate(row, row_sequence, sequences, T, N, NG, N, PACKED)
    if length < 0:
        return
    n = row - row0
    m = n // GROUP
    in_chunk = tl.arange(0, C)
    valid = in_chunk < length - n * C
    origin = (start + n * C).to(tl.int64)
    unit = row.to(tl.int64) * H + h
    scales = level_scales + origin * stride_s + h * L
    do_head = do + origin * stride_do + h * V
    dtype = inner_grads.dtype.element_ty
    gradient = tl.zeros([C, LEVELS], tl.float32)
    acc = tl.zeros([C, BK], tl.float32)

    slot = path_start(m, sequence, path_starts, paths, PACKED)
    nearest = entries + ((row0 + m * GROUP - 1).to(tl.int64) * HEADS + h) * SIZE
    queries = load_part_if(m > 0, group_queries + unit * (C * K), 0, 0, K, C, K, C, BK)
    rest = n - n % GROUP
    # One state arrives while the state before is multiplied. Two maps of the next loop would leave no room for this.
    for j in tl.range(set_bits(m), num_stages=2):
        source = tl.where(j > 0, states + ((slot + j).to(tl.int64) * H + h) * SIZE, nearest)
        product = entry_product(do_head, stride_do, valid, source, C, K, V, BK, BV, PRECISION)
        tree_level = log2_of_power(lowbit(rest))
        share, gain = state_gradient(product, queries, scales, stride_s, valid, tree_level, factor, L, LOG_C, C, LEVELS)
        acc += share
        gradient += gain
        rest &= rest - 1

    rest = n % GROUP
    slot = inner_start(n, row0) + set_bits(rest)
    for i in range(set_bits(rest // 2)):
        slot -= 1
        place = (slot.to(tl.int64) * H + h) * (C * K)
        tree_level = bit_length(rest) - 1
        rest -= 1 << tree_level
        entry = entries + ((row0 + n - rest - 1).to(tl.int64) * HEADS + h) * SIZE
        if (i > 0) | (m > 0):
            after = acc.to(dtype)
            store_part(inner_grads + place, after, 0, 0, K, C, K, C, BK)
            acc = times_transposed(after, entry, K + V, K, C, BK, PRECISION)
        product = entry_product(do_head, stride_do, valid, entry, C, K, V, BK, BV, PRECISION)
        queries = load_part(inner_queries + place, 0, 0, K, C, K, C, BK)
        share, gain = state_gradient(product, queries, scales, stride_s, valid, tree_level, factor, L, LOG_C, C, LEVELS)
        acc += share
        gradient += gain
    if n % 2 == 1:
        place = ((slot - 1).to(tl.int64) * H + h) * (C * K)
        before_k = k + (origin - C) * stride_k + h // (H // G) * K
        before_sums = sums + h.to(tl.int64) * sums_stride + (origin - C)
        written = writes + ((row - 1).to(tl.int64) * HEADS + h) * (C * (K + V))
        acc, gain = leaf_gradient(acc, inner_queries + place, inner_grads + place, n > 1, do_head, stride_do, valid, before_k,
                                  stride_k, before_sums, all_tokens, written, scales, stride_s, factor, L, LOG_C, C, K, V, BK,
                                  BV, LEVELS, EXACT, PRECISION)  # fmt: skip
        gradient += gain
    store_part(query_grads + unit * (C * K), acc, 0, 0, K, C, K, C, BK)
    columns = tl.arange(0, LEVELS)[None, :]
    place = dlevel_scales + origin * stride_ds + h * L + (in_chunk[:, None] * stride_ds + columns)
    tl.store(place, gradient.to(dlevel_scales.dtype.element_ty), mask=valid[:, None] & (columns < L))
