"""OUTPUT: each chunk attends to itself under the λ mask, then its queries read the entries that cover everything before it.

For an entry the queries add ``λ ∘ (Q S)`` and then jump over it, ``Q <- Q A``. The decay is part of A. The queries walk
the entries within their group; the first of these may be the chunk before (see leaf.py). The states of all other
entries have been carried to the start of the group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.delta.group_maps import load_square
from loglinear.kernels.delta.leaf import leaf_jump, leaf_scores
from loglinear.kernels.delta.path_states import path_start
from loglinear.kernels.delta.products import times_memory, token_products
from loglinear.kernels.delta.tiles import load_part
from loglinear.kernels.tree.decays import load_sum, pair_decays
from loglinear.kernels.tree.levels import SUB, assemble_mask, local_scales
from loglinear.kernels.tree.place import GROUP, locate, log2_of_power, lowbit, set_bits
from loglinear.kernels.tree.tiles import load_tile, store_tile


@triton.jit
def entry_scales(scales, stride, valid, e, factor, L, C: tl.constexpr, LOG_C: tl.constexpr):
    """λ ``[C]`` of each row towards entry e, times ``factor``. ``scales`` points at the chunk's first token, level 0."""
    level = tl.minimum(log2_of_power(lowbit(e)) + (LOG_C + 1), L - 1)
    return tl.load(scales + (tl.arange(0, C) * stride + level), mask=valid, other=0.0).to(tl.float32) * factor


@triton.jit
def local_products(q_head, k_head, stride_q, stride_k, valid, high, low, C: tl.constexpr, K: tl.constexpr,
                   BK: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``tril(Q Kᵀ ∘ Γ)`` of a chunk, in the inputs' dtype."""
    t = tl.arange(0, C)
    products = token_products(q_head, k_head, stride_q, stride_k, valid, C, K, BK, PRECISION)
    products *= pair_decays(high, low, EXACT)
    return tl.where(t[:, None] >= t[None, :], products, 0.0).to(q_head.dtype.element_ty)


@triton.jit
def start_queries(q_tile, products, erased, high, PRECISION: tl.constexpr):
    """Queries as seen from the start of their chunk, ``diag(γ) Q - P W``, in the inputs' dtype."""
    queries = q_tile.to(tl.float32) * tl.exp2(high)[:, None]
    return tl.dot(-products, erased, queries, input_precision=PRECISION).to(q_tile.dtype)


@triton.jit
def walk(acc, queries, entries, states, rows, n, slot, scales, stride, valid, factor, L, h, first_v, H: tl.constexpr,
         K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr,
         PRECISION: tl.constexpr):  # fmt: skip
    """Add ``λ ∘ (Q S)`` for every entry on the query path of chunk n except a leaf; then ``Q <- Q A`` if it is in the group.

    Entries before the group have states as seen from its start; all but the nearest are in ``states`` (see path_states.py).
    ``slot`` is the first slot of the group, ``rows`` row 0 of the sequence. A tile of S is as wide as A, so A and S take
    turns in one loop: one tile arrives while the other is multiplied, in the memory of two tiles and not of four.
    """
    MASKED: tl.constexpr = (K % BK != 0) or (V % BK != 0)
    own = 2 * set_bits(n % GROUP // 2)
    before = set_bits(n // GROUP)
    e = n // 2 * 2
    for step in range(own + before - (before == 0).to(tl.int32)):  # the last entry of all needs no jump
        j = step - own
        jump = (j < 0) & (step % 2 == 1)
        source = entries + (((rows + e - 1).to(tl.int64) * H + h) * (K * (K + V)) + tl.where(jump, 0, K))
        source = tl.where(j > 0, states + ((slot + j).to(tl.int64) * H + h) * (K * V), source)
        row_stride = tl.where(j > 0, V, K + V)
        first = tl.where(jump, 0, first_v)
        end = tl.where(jump, K, V)
        weight = tl.where(jump, 0.0, entry_scales(scales, stride, valid, e, factor, L, C, LOG_C))
        result = times_memory(queries, source, first, 0, end, row_stride, K, C, BK, BK, MASKED, PRECISION)
        acc += weight[:, None] * result
        queries = tl.where(jump, result.to(queries.dtype), queries)
        e = tl.where(jump | (j >= 0), e & (e - 1), e)
    return acc


@triton.jit(do_not_specialize=["T", "N", "NG", "paths", "all_tokens", "sums_stride", "L"])
def output_kernel(
    q,
    k,
    v,
    level_scales,
    sums,
    solve,
    writes,
    entries,
    states,  # [slots, H, K, V]
    o,
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
    stride_v,
    stride_s,
    factor,
    L,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LOG_C: tl.constexpr,
    BK: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: tiles of V, each as wide as K, x H x rows, rows fastest: running programs share the entries of few heads in L2.

    float32: scores, masks, accumulators. The queries are rounded to the inputs' dtype before each entry.
    """
    rows = tl.num_programs(0) // (H * ((V + BK - 1) // BK))
    pid = tl.program_id(0)
    row = pid % rows
    h = pid // rows % H
    first_v = pid // (rows * H) * BK
    start, length, row0, _, _, sequence = locate(row, row_sequence, sequences, T, N, NG, N, PACKED)
    if length < 0:
        return
    n = row - row0
    in_chunk = tl.arange(0, C)
    size = length - n * C
    valid = in_chunk < size
    origin = (start + n * C).to(tl.int64)
    unit = row.to(tl.int64) * H + h
    q_head = q + origin * stride_q + h // (H // G) * K
    k_head = k + origin * stride_k + h // (H // G) * K
    high, low = load_sum(sums + h.to(tl.int64) * sums_stride + origin, in_chunk, valid, all_tokens, EXACT)
    products = local_products(q_head, k_head, stride_q, stride_k, valid, high, low, C, K, BK, EXACT, PRECISION)
    q_tile = load_tile(q_head, stride_q, valid, C, K, BK, 0)
    erased = load_square(writes + unit * (C * (K + V)), K + V, C, K, C, BK)
    queries = start_queries(q_tile, products, erased, high, PRECISION)

    columns = first_v + tl.arange(0, BK)
    # A value that is not finite has spoilt its column of U, in every row.
    first_of_U = tl.load(writes + (unit * (C * (K + V)) + K) + columns, mask=columns < V, other=0.0).to(tl.float32)
    solved = tl.load(solve + unit * (C * C) + in_chunk[:, None] * C + in_chunk[None, :])
    scores = tl.dot(products, solved, input_precision=PRECISION)
    scales = level_scales + origin * stride_s + h * L
    near, far = local_scales(scales, valid, stride_s, factor, L, C)
    mask = tl.reshape(assemble_mask(near, far, tl.full([C // SUB, SUB], 1.0, tl.float32), C), [C, C])
    v_head = v + origin * stride_v + h * V
    first_bad = C
    if tl.sum(first_of_U * 0.0) != 0.0:
        rows_of_v = tl.sum(load_tile(v_head, stride_v, valid, C, V, BK, first_v).to(tl.float32) * 0.0, axis=1)
        first_bad = tl.min(tl.where(rows_of_v == 0.0, C, in_chunk), axis=0)
    v_tile = load_tile(v_head, stride_v, in_chunk < tl.minimum(size, first_bad), C, V, BK, first_v)
    acc = tl.dot((scores * mask).to(v_tile.dtype), v_tile, input_precision=PRECISION)
    if first_bad < C:
        acc = tl.where((in_chunk >= first_bad)[:, None], float("nan"), acc)

    if n % 2 == 1:
        before_k = k + (origin - C) * stride_k + h // (H // G) * K
        before_sums = sums + h.to(tl.int64) * sums_stride + (origin - C)
        before_written = writes + (unit - H) * (C * (K + V))
        # Loaded before they are used, to arrive in the meantime.
        added = load_part(before_written + K, 0, first_v, V, C, K + V, C, BK)
        erased = load_square(before_written, K + V, C, K, C, BK)
        weight = entry_scales(scales, stride_s, valid, n, factor, L, C, LOG_C)
        pairs = leaf_scores(queries, before_k, stride_k, before_sums, all_tokens, C, K, BK, EXACT, PRECISION)
        acc = tl.dot((pairs * weight[:, None]).to(v_tile.dtype), added, acc, input_precision=PRECISION)
        queries = leaf_jump(queries, pairs, before_sums, erased, C, PRECISION)
    slot = path_start(n // GROUP, sequence, path_starts, paths, PACKED)
    acc = walk(acc, queries, entries, states, row0, n, slot, scales, stride_s, valid, factor, L, h, first_v, H, K, V, C,
               LOG_C, BK, PRECISION)  # fmt: skip
    store_tile(o + origin * (H * V) + h * V, H * V, valid, acc, C, V, BK, first_v)
