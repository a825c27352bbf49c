"""OUTPUT: each chunk attends to itself under the λ mask, then its queries read the entries that cover everything before it.

For an entry the queries add ``λ ∘ (Q S)`` and then jump over it, ``Q <- Q A``. The decay is part of A. The queries walk
the entries within their octet; the first of these may be the chunk before (see leaf.py). The states of all other
entries have been carried to the start of the octet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.delta.leaf import jump, leaf_scores, whole_decay
from loglinear.kernels.delta.path_states import path_start
from loglinear.kernels.delta.products import load_erased, times_memory, token_products
from loglinear.kernels.tree.decays import load_sum, pairs
from loglinear.kernels.tree.levels import entry_scales, level_mask
from loglinear.kernels.tree.place import OCTET, chunk_of, log2_of_power, lowbit, row_of_program, set_bits
from loglinear.kernels.tree.tiles import key_head, load_part, load_tile, query_head, square, store_tokens


@triton.jit
def gate_scores(x, maps, site, here, h, high, low, S: tl.constexpr):
    """``P = tril(Q Kᵀ ∘ Γ)`` of a chunk, in the inputs' dtype."""
    if S.CHANNELS:
        scores = tl.load(square(maps.scores + site * (S.C * S.C), S.C))
    else:
        t = tl.arange(0, S.C)
        q, k = query_head(x, here, h, S), key_head(x, here, h, S)
        products = token_products(q, k, x.stride_q, x.stride_k, here.valid, S)
        products *= pairs(high, low, S)
        scores = tl.where(t[:, None] >= t[None, :], products, 0.0).to(x.q.dtype.element_ty)
    return scores


@triton.jit
def start_queries(q_tile, products, erased, high, PRECISION: tl.constexpr):
    """Queries as seen from the start of their chunk, ``diag(γ) Q - P W``, in the inputs' dtype."""
    queries = q_tile.to(tl.float32) * tl.exp2(high)[:, None]
    return tl.dot(-products, erased, queries, input_precision=PRECISION).to(q_tile.dtype)


@triton.jit
def walk(acc, queries, maps, states, x, at, here, h, slot, first_v, L, S: tl.constexpr):
    """Add ``λ ∘ (Q S)`` for every entry on the query path of a chunk except a leaf; then ``Q <- Q A`` if it is in the octet.

    Entries before the octet have states as seen from its start; all but the nearest are in ``states`` (see path_states.py).
    ``slot`` is the first slot of the octet. A tile of S is as wide as A, so A and S take turns in one loop: one tile arrives
    while the other is multiplied, in the memory of two tiles and not of four.
    """
    MASKED: tl.constexpr = (S.K % S.BK != 0) or (S.V % S.BK != 0)
    n = here.local
    own = 2 * set_bits(n % OCTET // 2)
    before = set_bits(n // OCTET)
    e = n // 2 * 2
    for step in range(own + before - (before == 0).to(tl.int32)):  # the last entry of all needs no jump
        j = step - own
        leap = (j < 0) & (step % 2 == 1)
        source = maps.entries + (
            ((at.chunk0 + e - 1).to(tl.int64) * S.H + h) * (S.K * (S.K + S.V)) + tl.where(leap, 0, S.K)
        )
        source = tl.where(j > 0, states + ((slot + j).to(tl.int64) * S.H + h) * (S.K * S.V), source)
        row_stride = tl.where(j > 0, S.V, S.K + S.V)
        first = tl.where(leap, 0, first_v)
        end = tl.where(leap, S.K, S.V)
        weight = tl.where(leap, 0.0, entry_scales(x, here, h, log2_of_power(lowbit(e)), L, S))
        result = times_memory(queries, source, row_stride, first, end, S.C, MASKED, S)
        acc += weight[:, None] * result
        queries = tl.where(leap, result.to(queries.dtype), queries)
        e = tl.where(leap | (j >= 0), e & (e - 1), e)
    return acc


@triton.jit(do_not_specialize=["T", "N", "NG", "paths", "all_tokens", "sums_stride", "L"])
def output_kernel(x, L, maps, states, o, path_starts, table, T, N, NG, paths, all_tokens, sums_stride, S: tl.constexpr):
    """Grid: tiles of V, each as wide as K, x H x chunks, chunks fastest: running programs share the entries of few heads in L2.

    float32: scores, masks, accumulators. The queries are rounded to the inputs' dtype before each entry.
    """
    at, chunk, block, _ = row_of_program(table, T, N, NG, S.H * ((S.V + S.BK - 1) // S.BK), S)
    h, first_v = block % S.H, block // S.H * S.BK
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    n, in_chunk, valid, origin = here.local, tl.arange(0, S.C), here.valid, here.origin
    site = chunk.to(tl.int64) * S.H + h
    head_sums = maps.sums + h.to(tl.int64) * sums_stride + origin
    high, low = load_sum(head_sums, in_chunk, valid, all_tokens, S)
    products = gate_scores(x, maps, site, here, h, high, low, S)
    q_tile = load_tile(query_head(x, here, h, S), x.stride_q, valid, S.C, S.K, S.BK, 0)
    written = maps.writes + site * (S.C * (S.K + S.V))
    queries = start_queries(q_tile, products, load_erased(written, S), high, S.PRECISION)

    columns = first_v + tl.arange(0, S.BK)
    # A value that is not finite has spoilt its column of U, for every token.
    first_of_U = tl.load(written + S.K + columns, mask=columns < S.V, other=0.0).to(tl.float32)
    solved = tl.load(square(maps.solve + site * (S.C * S.C), S.C))
    scores = tl.dot(products, solved, input_precision=S.PRECISION)
    mask = level_mask(x, here, h, L, S)
    v_head = x.v + origin * x.stride_v + h * S.V
    first_bad = S.C
    if tl.sum(first_of_U * 0.0) != 0.0:
        rows_of_v = tl.sum(load_tile(v_head, x.stride_v, valid, S.C, S.V, S.BK, first_v).to(tl.float32) * 0.0, axis=1)
        first_bad = tl.min(tl.where(rows_of_v == 0.0, S.C, in_chunk), axis=0)
    v_tile = load_tile(v_head, x.stride_v, in_chunk < tl.minimum(here.size, first_bad), S.C, S.V, S.BK, first_v)
    acc = tl.dot((scores * mask).to(v_tile.dtype), v_tile, input_precision=S.PRECISION)
    if first_bad < S.C:
        acc = tl.where((in_chunk >= first_bad)[:, None], float("nan"), acc)

    if n % 2 == 1:
        before_written = maps.writes + (site - S.H) * (S.C * (S.K + S.V))
        # Loaded before they are used, to arrive in the meantime.
        added = load_part(before_written + S.K, S.K + S.V, 0, first_v, S.C, S.V, S.C, S.BK)
        erased = load_erased(before_written, S)
        weight = entry_scales(x, here, h, 0, L, S)
        keys = key_head(x, here, h, S) - S.C * x.stride_k
        pairs_before = leaf_scores(queries, keys, x.stride_k, head_sums - S.C, all_tokens, S)
        acc = tl.dot((pairs_before * weight[:, None]).to(v_tile.dtype), added, acc, input_precision=S.PRECISION)
        decay = whole_decay(head_sums - S.C, S.C - 1, maps.chunk_log, site - S.H, S)
        queries = jump(queries, pairs_before, decay, erased, S)
    slot = path_start(n // OCTET, at, path_starts, paths, S.PACKED)
    acc = walk(acc, queries, maps, states, x, at, here, h, slot, first_v, L, S)
    store_tokens(o, S.H * S.V, h, here, acc, S.C, S.V, S.BK, first_v)
