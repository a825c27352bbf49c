"""PATH QUERIES: the queries of a chunk as seen before each entry of their path within the octet, and at the octet's start.

The backward walks the path back and needs them. The entries before the octet are read as states carried to its start.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.fenwick import query_path
from loglinear.kernels.delta.leaf import jump, leaf_scores, whole_decay
from loglinear.kernels.delta.output import gate_scores, start_queries
from loglinear.kernels.delta.products import load_erased, times_memory
from loglinear.kernels.tree.decays import load_sum
from loglinear.kernels.tree.place import OCTET, chunk_of, lowbit, row_of_program, set_bits, set_bits_before
from loglinear.kernels.tree.tiles import key_head, load_tile, query_head, store_part

# Entries that lie within an octet on the paths of its chunks.
IN_OCTET = tl.constexpr(sum(len(list(query_path(n))) for n in range(OCTET.value)))


@triton.jit
def inner_start(n, chunk0):
    """Slot of the first entry on the path of chunk n in an array of all that lie within their octet.

    The first N chunks of a sequence have at most 1.5 N of these entries, so a sequence begins at 1.5 times its first chunk.
    """
    return chunk0 + chunk0 // 2 + n // OCTET * IN_OCTET + set_bits_before(n % OCTET)


@triton.jit
def store_queries(base, tile, S: tl.constexpr):
    store_part(base, S.K, tile, 0, 0, S.C, S.K, S.C, S.BK)


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride"])
def path_queries_kernel(
    x, maps, inner_queries, octet_queries, table, T, N, NG, all_tokens, sums_stride, S: tl.constexpr
):
    """``inner_queries [1.5 chunks, H, C, K]``: before each entry within their octet, the nearest first. ``octet_queries
    [chunks, H, C, K]``: as seen from the start of their octet; none in a sequence's first.

    Grid: H x chunks, chunks fastest. float32: scores, decays, accumulators.
    """
    at, chunk, h, _ = row_of_program(table, T, N, NG, S.H, S)
    n = chunk - at.chunk0
    if (at.length < 0) | (n == 0):
        return
    here = chunk_of(at, chunk, S.C)
    kept = chunk.to(tl.int64) * S.HEADS + h
    head_sums = maps.sums + h.to(tl.int64) * sums_stride + here.origin
    high, low = load_sum(head_sums, tl.arange(0, S.C), here.valid, all_tokens, S)
    products = gate_scores(x, maps, kept, here, h, high, low, S)
    q_tile = load_tile(query_head(x, here, h, S), x.stride_q, here.valid, S.C, S.K, S.BK, 0)
    written = maps.writes + kept * (S.C * (S.K + S.V))
    queries = start_queries(q_tile, products, load_erased(written, S), high, S.PRECISION)
    slot = inner_start(n, at.chunk0)
    first_octet = n < OCTET
    leaf = ((n % 2 == 1) & (n > 1)).to(tl.int32)  # no jump past the last entry of all
    if leaf == 1:
        store_queries(inner_queries + (slot.to(tl.int64) * S.H + h) * (S.C * S.K), queries, S)
        erased = load_erased(maps.writes + (kept - S.HEADS) * (S.C * (S.K + S.V)), S)
        keys = key_head(x, here, h, S) - S.C * x.stride_k
        pairs = leaf_scores(queries, keys, x.stride_k, head_sums - S.C, all_tokens, S)
        decay = whole_decay(head_sums - S.C, S.C - 1, maps.chunk_log, kept - S.HEADS, S)
        queries = jump(queries, pairs, decay, erased, S)
    slot += leaf
    e = n - leaf
    for _ in range(set_bits(n % OCTET) - first_octet.to(tl.int32) - leaf):
        store_queries(inner_queries + (slot.to(tl.int64) * S.H + h) * (S.C * S.K), queries, S)
        entry = maps.entries + ((at.chunk0 + e - 1).to(tl.int64) * S.HEADS + h) * (S.K * (S.K + S.V))
        after = times_memory(queries, entry, S.K + S.V, 0, S.K, S.C, S.K % S.BK != 0, S)
        queries = after.to(queries.dtype)
        slot += 1
        e -= lowbit(e)
    inner = inner_queries + (slot.to(tl.int64) * S.H + h) * (S.C * S.K)
    of_group = octet_queries + (chunk.to(tl.int64) * S.H + h) * (S.C * S.K)
    store_queries(tl.where(first_octet, inner, of_group), queries, S)
