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
def entry_scales(scales, valid, e, L, x, S: tl.constexpr):
    """λ ``[C]`` of each row towards entry e, times ``factor``. ``scales`` points at the chunk's first token, level 0."""
    level = tl.minimum(log2_of_power(lowbit(e)) + (S.LOG_C + 1), L - 1)
    return (
        tl.load(scales + (tl.arange(0, S.C) * x.stride_scales + level), mask=valid, other=0.0).to(tl.float32) * x.factor
    )


@triton.jit
def local_products(q_head, k_head, stride_q, stride_k, valid, high, low, S: tl.constexpr):
    """``tril(Q Kᵀ ∘ Γ)`` of a chunk, in the inputs' dtype."""
    t = tl.arange(0, S.C)
    products = token_products(q_head, k_head, stride_q, stride_k, valid, S)
    products *= pair_decays(high, low, S.EXACT)
    return tl.where(t[:, None] >= t[None, :], products, 0.0).to(q_head.dtype.element_ty)


@triton.jit
def start_queries(q_tile, products, erased, high, PRECISION: tl.constexpr):
    """Queries as seen from the start of their chunk, ``diag(γ) Q - P W``, in the inputs' dtype."""
    queries = q_tile.to(tl.float32) * tl.exp2(high)[:, None]
    return tl.dot(-products, erased, queries, input_precision=PRECISION).to(q_tile.dtype)


@triton.jit
def walk(acc, queries, entries, states, rows, n, slot, scales, valid, L, h, first_v, x, S: tl.constexpr):
    """Add ``λ ∘ (Q S)`` for every entry on the query path of chunk n except a leaf; then ``Q <- Q A`` if it is in the group.

    Entries before the group have states as seen from its start; all but the nearest are in ``states`` (see path_states.py).
    ``slot`` is the first slot of the group, ``rows`` row 0 of the sequence. A tile of S is as wide as A, so A and S take
    turns in one loop: one tile arrives while the other is multiplied, in the memory of two tiles and not of four.
    """
    MASKED: tl.constexpr = (S.K % S.BK != 0) or (S.V % S.BK != 0)
    own = 2 * set_bits(n % GROUP // 2)
    before = set_bits(n // GROUP)
    e = n // 2 * 2
    for step in range(own + before - (before == 0).to(tl.int32)):  # the last entry of all needs no jump
        j = step - own
        jump = (j < 0) & (step % 2 == 1)
        source = entries + (((rows + e - 1).to(tl.int64) * S.H + h) * (S.K * (S.K + S.V)) + tl.where(jump, 0, S.K))
        source = tl.where(j > 0, states + ((slot + j).to(tl.int64) * S.H + h) * (S.K * S.V), source)
        row_stride = tl.where(j > 0, S.V, S.K + S.V)
        first = tl.where(jump, 0, first_v)
        end = tl.where(jump, S.K, S.V)
        weight = tl.where(jump, 0.0, entry_scales(scales, valid, e, L, x, S))
        result = times_memory(queries, source, first, 0, end, row_stride, S.K, S.C, S.BK, MASKED, S)
        acc += weight[:, None] * result
        queries = tl.where(jump, result.to(queries.dtype), queries)
        e = tl.where(jump | (j >= 0), e & (e - 1), e)
    return acc


@triton.jit(do_not_specialize=["T", "N", "NG", "paths", "all_tokens", "sums_stride", "L"])
def output_kernel(
    x,
    L,
    maps,
    states,  # [slots, H, K, V]
    o,
    path_starts,
    table,
    T,
    N,
    NG,
    paths,
    all_tokens,
    sums_stride,
    S: tl.constexpr,
):
    """Grid: tiles of V, each as wide as K, x H x rows, rows fastest: running programs share the entries of few heads in L2.

    float32: scores, masks, accumulators. The queries are rounded to the inputs' dtype before each entry.
    """
    rows = tl.num_programs(0) // (S.H * ((S.V + S.BK - 1) // S.BK))
    pid = tl.program_id(0)
    row = pid % rows
    h = pid // rows % S.H
    first_v = pid // (rows * S.H) * S.BK
    start, length, row0, _, _, sequence = locate(row, table, T, N, NG, N, S.PACKED)
    if length < 0:
        return
    n = row - row0
    in_chunk = tl.arange(0, S.C)
    size = length - n * S.C
    valid = in_chunk < size
    origin = (start + n * S.C).to(tl.int64)
    unit = row.to(tl.int64) * S.H + h
    q_head = x.q + origin * x.stride_q + h // (S.H // S.G) * S.K
    k_head = x.k + origin * x.stride_k + h // (S.H // S.G) * S.K
    high, low = load_sum(maps.sums + h.to(tl.int64) * sums_stride + origin, in_chunk, valid, all_tokens, S.EXACT)
    products = local_products(q_head, k_head, x.stride_q, x.stride_k, valid, high, low, S)
    q_tile = load_tile(q_head, x.stride_q, valid, S.C, S.K, S.BK, 0)
    erased = load_square(maps.writes + unit * (S.C * (S.K + S.V)), S.K + S.V, S.C, S.C, S)
    queries = start_queries(q_tile, products, erased, high, S.PRECISION)

    columns = first_v + tl.arange(0, S.BK)
    # A value that is not finite has spoilt its column of U, in every row.
    first_of_U = tl.load(maps.writes + (unit * (S.C * (S.K + S.V)) + S.K) + columns, mask=columns < S.V, other=0.0).to(
        tl.float32
    )
    solved = tl.load(maps.solve + unit * (S.C * S.C) + in_chunk[:, None] * S.C + in_chunk[None, :])
    scores = tl.dot(products, solved, input_precision=S.PRECISION)
    scales = x.scales + origin * x.stride_scales + h * L
    near, far = local_scales(scales, valid, x.stride_scales, x.factor, L, S.C)
    mask = tl.reshape(assemble_mask(near, far, tl.full([S.C // SUB, SUB], 1.0, tl.float32), S.C), [S.C, S.C])
    v_head = x.v + origin * x.stride_v + h * S.V
    first_bad = S.C
    if tl.sum(first_of_U * 0.0) != 0.0:
        rows_of_v = tl.sum(load_tile(v_head, x.stride_v, valid, S.C, S.V, S.BK, first_v).to(tl.float32) * 0.0, axis=1)
        first_bad = tl.min(tl.where(rows_of_v == 0.0, S.C, in_chunk), axis=0)
    v_tile = load_tile(v_head, x.stride_v, in_chunk < tl.minimum(size, first_bad), S.C, S.V, S.BK, first_v)
    acc = tl.dot((scores * mask).to(v_tile.dtype), v_tile, input_precision=S.PRECISION)
    if first_bad < S.C:
        acc = tl.where((in_chunk >= first_bad)[:, None], float("nan"), acc)

    if n % 2 == 1:
        before_k = x.k + (origin - S.C) * x.stride_k + h // (S.H // S.G) * S.K
        before_sums = maps.sums + h.to(tl.int64) * sums_stride + (origin - S.C)
        before_written = maps.writes + (unit - S.H) * (S.C * (S.K + S.V))
        # Loaded before they are used, to arrive in the meantime.
        added = load_part(before_written + S.K, 0, first_v, S.V, S.C, S.K + S.V, S.C, S.BK)
        erased = load_square(before_written, S.K + S.V, S.C, S.C, S)
        weight = entry_scales(scales, valid, n, L, x, S)
        pairs = leaf_scores(queries, before_k, x.stride_k, before_sums, all_tokens, S)
        acc = tl.dot((pairs * weight[:, None]).to(v_tile.dtype), added, acc, input_precision=S.PRECISION)
        queries = leaf_jump(queries, pairs, before_sums, erased, S)
    slot = path_start(n // GROUP, sequence, path_starts, paths, S.PACKED)
    acc = walk(acc, queries, maps.entries, states, row0, n, slot, scales, valid, L, h, first_v, x, S)
    store_tile(o + origin * (S.H * S.V) + h * S.V, S.H * S.V, valid, acc, S.C, S.V, S.BK, first_v)
