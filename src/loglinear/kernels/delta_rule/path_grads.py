"""PATH GRADIENTS: every chunk's walk over its query path backwards, from the oldest entry to the nearest.

An entry (A, S) that the queries Q meet gives ``O += λ ∘ (Q S)`` and ``Q' = Q A``. So with dQ' known, the products ``dO Sᵀ`` and
``dQ' Aᵀ`` give dλ, and dQ, which is dQ' of the entry before. What is left at the end is the gradient of the queries as seen
from the start of their chunk. Every dQ' is kept for the gradients of the entries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.common import bit_length, load_tile, locate, path_length
from loglinear.kernels.delta_rule.group_maps import map_tile
from loglinear.kernels.delta_rule.path_queries import path_start
from loglinear.kernels.delta_rule.products import times_transposed
from loglinear.kernels.delta_rule.tiles import load_part, store_part


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


@triton.jit(do_not_specialize=["T", "N", "NG", "paths", "L"])
def path_grads_kernel(
    do,
    level_scales,
    entries,
    path_queries,  # [slots, H, C, K] queries before each entry of each path
    path_grads,  # [slots, H, C, K] gradient of the queries after it; none for the last entry of a path, where it is zero
    query_grads,  # [rows, H, C, K] gradient of the queries as seen from the start of their chunk
    dlevel_scales,
    path_starts,
    row_sequence,
    sequences,
    T,
    N,
    NG,
    paths,
    stride_do,
    stride_s,
    stride_ds,
    factor,
    L,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LOG_C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    LEVELS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: H x rows, rows fastest. float32: accumulators, dλ. The gradient is rounded before each product with A."""
    rows = tl.num_programs(0) // H
    pid = tl.program_id(0)
    row = pid % rows
    h = pid // rows
    start, length, row0, _, _, sequence = locate(row, row_sequence, sequences, T, N, NG, N, PACKED)
    if length < 0:
        return
    n = row - row0
    in_chunk = tl.arange(0, C)
    valid = in_chunk < length - n * C
    origin = (start + n * C).to(tl.int64)
    scales = level_scales + origin * stride_s + h * L
    do_head = do + origin * stride_do + h * V
    count = path_length(n, 0)
    slot = path_start(n, sequence, path_starts, paths, PACKED) + count
    dtype = path_grads.dtype.element_ty
    columns = tl.arange(0, LEVELS)[None, :]
    gradient = tl.zeros([C, LEVELS], tl.float32)
    acc = tl.zeros([C, BK], tl.float32)
    rest = n
    for i in range(count):
        slot -= 1
        place = (slot.to(tl.int64) * H + h) * (C * K)
        tree_level = bit_length(rest) - 1
        rest -= 1 << tree_level
        entry = entries + ((row0 + n - rest - 1).to(tl.int64) * H + h) * (K * (K + V))
        if i > 0:
            after = acc.to(dtype)
            store_part(path_grads + place, after, 0, 0, K, C, K, C, BK)
            acc = times_transposed(after, entry, K + V, K, C, BK, PRECISION)
        level = tl.minimum(tree_level + LOG_C + 1, L - 1)
        scale = tl.load(scales + (in_chunk * stride_s + level), mask=valid, other=0.0).to(tl.float32) * factor
        product = entry_product(do_head, stride_do, valid, entry, C, K, V, BK, BV, PRECISION)
        acc += scale[:, None] * product
        queries = load_part(path_queries + place, 0, 0, K, C, K, C, BK)
        gain = tl.sum(product * queries.to(tl.float32), axis=1) * factor
        gradient += tl.where(columns == level, gain[:, None], 0.0)
    store_part(query_grads + (row.to(tl.int64) * H + h) * (C * K), acc, 0, 0, K, C, K, C, BK)
    place = dlevel_scales + origin * stride_ds + h * L + (in_chunk[:, None] * stride_ds + columns)
    tl.store(place, gradient.to(dlevel_scales.dtype.element_ty), mask=valid[:, None] & (columns < L))
