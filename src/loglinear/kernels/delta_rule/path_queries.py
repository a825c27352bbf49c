"""PATH QUERIES: what the queries of a chunk are before each entry of its path, for the backward, which walks it back."""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.common import load_sum, load_tile, locate, lowbit, path_length, set_bits_before
from loglinear.kernels.delta_rule.group_maps import load_square, map_tile
from loglinear.kernels.delta_rule.output import local_products, start_queries
from loglinear.kernels.delta_rule.products import times_memory


@triton.jit
def path_start(n, sequence, path_starts, paths, PACKED: tl.constexpr):
    """Slot of the first entry on the path of chunk n in an array of all paths."""
    if PACKED:
        before = tl.load(path_starts + sequence)
    else:
        before = sequence * paths
    return before + set_bits_before(n)


@triton.jit
def store_queries(base, tile, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    pointers, inside = map_tile(base, 0, 0, K, K, C, C, BK)
    tl.store(pointers, tile, mask=inside)


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "paths"])
def path_queries_kernel(
    q,
    k,
    sums,
    writes,
    entries,
    path_queries,  # [slots, H, C, K] queries before each entry of each path, nearest entry first
    path_starts,
    row_sequence,
    sequences,
    T,
    N,
    NG,
    paths,
    all_tokens,
    sums_stride,
    stride_q,
    stride_k,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: H x rows, rows fastest. float32: scores, decays, accumulators."""
    rows = tl.num_programs(0) // H
    pid = tl.program_id(0)
    row = pid % rows
    h = pid // rows
    start, length, row0, _, _, sequence = locate(row, row_sequence, sequences, T, N, NG, N, PACKED)
    n = row - row0
    if (length < 0) | (n == 0):
        return
    in_chunk = tl.arange(0, C)
    valid = in_chunk < length - n * C
    origin = (start + n * C).to(tl.int64)
    unit = row.to(tl.int64) * H + h
    q_head = q + origin * stride_q + h // (H // G) * K
    k_head = k + origin * stride_k + h // (H // G) * K
    high, low = load_sum(sums + h.to(tl.int64) * sums_stride + origin, in_chunk, valid, all_tokens, EXACT)
    products = local_products(q_head, k_head, stride_q, stride_k, valid, high, low, C, K, BK, EXACT, PRECISION)
    q_tile = load_tile(q_head, stride_q, valid, C, K, BK, 0)
    erased = load_square(writes + unit * (C * (K + V)), K + V, C, K, C, BK)
    queries = start_queries(q_tile, products, erased, high, PRECISION)
    slot = path_start(n, sequence, path_starts, paths, PACKED)
    store_queries(path_queries + (slot.to(tl.int64) * H + h) * (C * K), queries, K, C, BK)
    e = n
    for i in range(1, path_length(n, 0)):
        entry = entries + ((row0 + e - 1).to(tl.int64) * H + h) * (K * (K + V))
        queries = times_memory(queries, entry, 0, 0, K, K + V, K, C, BK, BK, K % BK != 0, PRECISION).to(queries.dtype)
        store_queries(path_queries + ((slot + i).to(tl.int64) * H + h) * (C * K), queries, K, C, BK)
        e -= lowbit(e)
