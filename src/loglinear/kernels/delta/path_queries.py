"""PATH QUERIES: the queries of a chunk as seen before each entry of their path within the group, and at the group's start.

The backward walks the path back and needs them. The entries before the group are read as states carried to its start.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.fenwick import query_path
from loglinear.kernels.delta.leaf import jump, leaf_scores
from loglinear.kernels.delta.output import gate_scores, start_queries
from loglinear.kernels.delta.products import load_erased, times_memory
from loglinear.kernels.tree.decays import load_sum
from loglinear.kernels.tree.place import GROUP, chunk_of, lowbit, row_of_program, set_bits, set_bits_before
from loglinear.kernels.tree.tiles import key_head, load_tile, query_head, store_part

# Entries that lie within a group on the paths of its chunks.
IN_GROUP = tl.constexpr(sum(len(list(query_path(n))) for n in range(GROUP.value)))


@triton.jit
def inner_start(n, row0):
    """Slot of the first entry on the path of chunk n in an array of all that lie within their group.

    The first N chunks of a sequence have at most 1.5 N of these entries, so a sequence begins at 1.5 times its first row.
    """
    return row0 + row0 // 2 + n // GROUP * IN_GROUP + set_bits_before(n % GROUP)


@triton.jit
def store_queries(base, tile, S: tl.constexpr):
    store_part(base, S.K, tile, 0, 0, S.C, S.K, S.C, S.BK)


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride"])
def path_queries_kernel(
    x, maps, inner_queries, group_queries, table, T, N, NG, all_tokens, sums_stride, S: tl.constexpr
):
    """``inner_queries [1.5 rows, H, C, K]``: before each entry within their group, the nearest first. ``group_queries
    [rows, H, C, K]``: as seen from the start of their group; none in a sequence's first.

    Grid: H x rows, rows fastest. float32: scores, decays, accumulators.
    """
    at, row, h, _ = row_of_program(table, T, N, NG, S.H, S)
    n = row - at.row0
    if (at.length < 0) | (n == 0):
        return
    here = chunk_of(at, row, S.C)
    kept = row.to(tl.int64) * S.HEADS + h
    head_sums = maps.sums + h.to(tl.int64) * sums_stride + here.origin
    high, low = load_sum(head_sums, tl.arange(0, S.C), here.valid, all_tokens, S)
    products = gate_scores(x, here, h, high, low, S)
    q_tile = load_tile(query_head(x, here, h, S), x.stride_q, here.valid, S.C, S.K, S.BK, 0)
    written = maps.writes + kept * (S.C * (S.K + S.V))
    queries = start_queries(q_tile, products, load_erased(written, S), high, S.PRECISION)
    slot = inner_start(n, at.row0)
    first_group = n < GROUP
    leaf = ((n % 2 == 1) & (n > 1)).to(tl.int32)  # no jump past the last entry of all
    if leaf == 1:
        store_queries(inner_queries + (slot.to(tl.int64) * S.H + h) * (S.C * S.K), queries, S)
        erased = load_erased(maps.writes + (kept - S.HEADS) * (S.C * (S.K + S.V)), S)
        keys = key_head(x, here, h, S) - S.C * x.stride_k
        pairs = leaf_scores(queries, keys, x.stride_k, head_sums - S.C, all_tokens, S)
        queries = jump(queries, pairs, head_sums - S.C, erased, S)
    slot += leaf
    e = n - leaf
    for _ in range(set_bits(n % GROUP) - first_group.to(tl.int32) - leaf):
        store_queries(inner_queries + (slot.to(tl.int64) * S.H + h) * (S.C * S.K), queries, S)
        entry = maps.entries + ((at.row0 + e - 1).to(tl.int64) * S.HEADS + h) * (S.K * (S.K + S.V))
        after = times_memory(queries, entry, S.K + S.V, 0, S.K, S.C, S.K % S.BK != 0, S)
        queries = after.to(queries.dtype)
        slot += 1
        e -= lowbit(e)
    inner = inner_queries + (slot.to(tl.int64) * S.H + h) * (S.C * S.K)
    of_group = group_queries + (row.to(tl.int64) * S.H + h) * (S.C * S.K)
    store_queries(tl.where(first_group, inner, of_group), queries, S)
