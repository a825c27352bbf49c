"""PATH QUERIES: the queries of a chunk as seen before each entry of their path within the group, and at the group's start.

The backward walks the path back and needs them. The entries before the group are read as states carried to its start.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.delta.group_maps import load_square, map_tile
from loglinear.kernels.delta.leaf import leaf_jump, leaf_scores
from loglinear.kernels.delta.output import local_products, start_queries
from loglinear.kernels.delta.products import times_memory
from loglinear.kernels.tree.decays import load_sum
from loglinear.kernels.tree.place import GROUP, locate, lowbit, set_bits, set_bits_before
from loglinear.kernels.tree.tiles import load_tile

IN_GROUP = tl.constexpr(12)  # entries that lie within a group on the paths of its chunks: bits set in 0 … 7


@triton.jit
def inner_start(n, row0):
    """Slot of the first entry on the path of chunk n in an array of all that lie within their group.

    The first N chunks of a sequence have at most 1.5 N of these entries, so a sequence begins at 1.5 times its first row.
    """
    return row0 + row0 // 2 + n // GROUP * IN_GROUP + set_bits_before(n % GROUP)


@triton.jit
def store_queries(base, tile, S: tl.constexpr):
    pointers, inside = map_tile(base, 0, 0, S.K, S.K, S.C, S.C, S.BK)
    tl.store(pointers, tile, mask=inside)


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride"])
def path_queries_kernel(
    x,
    maps,
    inner_queries,  # [1.5 rows, H, C, K] queries before each entry within their group, nearest entry first
    group_queries,  # [rows, H, C, K] queries as seen from the start of their group; none in a sequence's first
    table,
    T,
    N,
    NG,
    all_tokens,
    sums_stride,
    S: tl.constexpr,
):
    """Grid: H x rows, rows fastest. float32: scores, decays, accumulators."""
    rows = tl.num_programs(0) // S.H
    pid = tl.program_id(0)
    row = pid % rows
    h = pid // rows
    start, length, row0, _, _, _ = locate(row, table, T, N, NG, N, S.PACKED)
    n = row - row0
    if (length < 0) | (n == 0):
        return
    in_chunk = tl.arange(0, S.C)
    valid = in_chunk < length - n * S.C
    origin = (start + n * S.C).to(tl.int64)
    unit = row.to(tl.int64) * S.H + h
    kept = row.to(tl.int64) * S.HEADS + h
    q_head = x.q + origin * x.stride_q + h // (S.H // S.G) * S.K
    k_head = x.k + origin * x.stride_k + h // (S.H // S.G) * S.K
    high, low = load_sum(maps.sums + h.to(tl.int64) * sums_stride + origin, in_chunk, valid, all_tokens, S.EXACT)
    products = local_products(q_head, k_head, x.stride_q, x.stride_k, valid, high, low, S)
    q_tile = load_tile(q_head, x.stride_q, valid, S.C, S.K, S.BK, 0)
    erased = load_square(maps.writes + kept * (S.C * (S.K + S.V)), S.K + S.V, S.C, S.C, S)
    queries = start_queries(q_tile, products, erased, high, S.PRECISION)
    slot = inner_start(n, row0)
    first_group = n < GROUP
    leaf = ((n % 2 == 1) & (n > 1)).to(tl.int32)  # no jump past the last entry of all
    if leaf == 1:
        store_queries(inner_queries + (slot.to(tl.int64) * S.H + h) * (S.C * S.K), queries, S)
        before_sums = maps.sums + h.to(tl.int64) * sums_stride + (origin - S.C)
        erased = load_square(maps.writes + (kept - S.HEADS) * (S.C * (S.K + S.V)), S.K + S.V, S.C, S.C, S)
        pairs = leaf_scores(queries, k_head - S.C * x.stride_k, x.stride_k, before_sums, all_tokens, S)
        queries = leaf_jump(queries, pairs, before_sums, erased, S)
    slot += leaf
    e = n - leaf
    for _ in range(set_bits(n % GROUP) - first_group.to(tl.int32) - leaf):
        store_queries(inner_queries + (slot.to(tl.int64) * S.H + h) * (S.C * S.K), queries, S)
        entry = maps.entries + ((row0 + e - 1).to(tl.int64) * S.HEADS + h) * (S.K * (S.K + S.V))
        queries = times_memory(queries, entry, 0, 0, S.K, S.K + S.V, S.K, S.C, S.BK, S.K % S.BK != 0, S).to(
            queries.dtype
        )
        slot += 1
        e -= lowbit(e)
    last = tl.where(
        first_group, inner_queries + (slot.to(tl.int64) * S.H + h) * (S.C * S.K), group_queries + unit * (S.C * S.K)
    )
    store_queries(last, queries, S)
