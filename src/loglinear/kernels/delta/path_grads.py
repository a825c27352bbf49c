"""PATH GRADIENTS: the walk of every chunk back over its query path, from the oldest entry to the nearest.

Each state before the octet, as seen from its start, gave ``O += λ ∘ (Q S)``, so ``dO Sᵀ`` gives dλ, and its sum over
the states gives dQ. An entry (A, S) within the octet also gave ``Q' = Q A``: with dQ' known, ``dQ' Aᵀ`` is the other
part of dQ, and this dQ is dQ' of the entry before. The last entry may be a leaf (see leaf.py). The remainder at the end
is the gradient of the queries as seen from the start of their chunk. Every dQ' is kept for the gradients of the
entries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.delta.leaf import leaf_scores, of_columns, whole_decay
from loglinear.kernels.delta.path_queries import inner_start
from loglinear.kernels.delta.path_states import path_start
from loglinear.kernels.delta.products import times_tokens, times_transposed
from loglinear.kernels.tree.decays import to_end
from loglinear.kernels.tree.levels import entry_scales
from loglinear.kernels.tree.place import OCTET, bit_length, chunk_of, log2_of_power, lowbit, row_of_program, set_bits
from loglinear.kernels.tree.tiles import key_head, load_block, load_part, load_tile, load_tokens, store_part


@triton.jit
def entry_product(x, here, h, entry, S: tl.constexpr):
    """``dO Sᵀ`` ``[C, BK]`` of an entry ``[A | S]``, over tiles of V."""
    product = tl.zeros([S.C, S.BK], tl.float32)
    for first in range(0, S.V, S.BV):
        do_tile = load_tokens(x.do, x.stride_do, h, here, S.C, S.V, S.BV, first)
        state = load_part(entry + S.K, S.K + S.V, 0, first, S.K, S.V, S.BK, S.BV)
        product = tl.dot(do_tile, tl.trans(state), product, input_precision=S.PRECISION)
    return product


@triton.jit
def state_gradient(product, queries, x, here, h, tree_level, L, S: tl.constexpr):
    """(share of dQ, of dλ ``[C, LEVELS]``) of a state of 2^tree_level chunks, from ``product = dO Sᵀ`` and the queries."""
    scale = entry_scales(x, here, h, tree_level, L, S)
    gain = tl.sum(product * queries.to(tl.float32), axis=1) * x.factor
    level = tl.minimum(tree_level + S.LOG_C + 1, L - 1)
    return scale[:, None] * product, tl.where(tl.arange(0, S.LEVELS)[None, :] == level, gain[:, None], 0.0)


@triton.jit
def leaf_gradient(acc, queries, x, here, h, keys, sums, plane, written, decay, L, S: tl.constexpr):
    """(dQ, dλ) past the entry of one chunk, whose keys, sums, ``[W | U]`` and decay are given; acc is the gradient after it.

    ``(λ ∘ dO) Uᵀ - dQ' Wᵀ`` is the gradient of ``G = Q K_endᵀ``.
    """
    everywhere = tl.arange(0, S.C) >= 0
    after = acc.to(x.do.dtype.element_ty)
    outer = tl.zeros([S.C, S.C], tl.float32)
    for first in range(0, S.V, S.BV):
        do_tile = load_tokens(x.do, x.stride_do, h, here, S.C, S.V, S.BV, first)
        added = load_tile(written + S.K, S.K + S.V, everywhere, S.C, S.V, S.BV, first)
        outer = tl.dot(do_tile, tl.trans(added), outer, input_precision=S.PRECISION)
    pairs = leaf_scores(load_part(queries, S.K, 0, 0, S.C, S.K, S.C, S.BK), keys, x.stride_k, sums, plane, S)
    share, gain = state_gradient(outer, pairs, x, here, h, 0, L, S)
    share -= times_tokens(after, written, S.K + S.V, everywhere, S)
    share = (share * to_end(sums, S.C, plane, S)[None, :]).to(after.dtype)
    acc = acc * of_columns(decay, S)
    k_tile = load_tile(keys, x.stride_k, everywhere, S.C, S.K, S.BK, 0)
    return tl.dot(share, k_tile, acc, input_precision=S.PRECISION), gain


@triton.jit(do_not_specialize=["T", "N", "NG", "paths", "all_tokens", "sums_stride", "L"])
def path_grads_kernel(
    x,
    L,
    maps,
    states,  # [slots, H, K, K+V], as path_states leaves them
    inner_queries,  # [1.5 chunks, H, C, K] queries before each entry within their octet
    octet_queries,  # [chunks, H, C, K] queries as seen from the start of their octet
    inner_grads,  # [1.5 chunks, H, C, K] gradient of the queries after it; none for the last entry of all, where it is zero
    query_grads,  # [chunks, H, C, K] gradient of the queries as seen from the start of their chunk
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
):
    """Grid: H x chunks, chunks fastest. float32: accumulators, dλ. The gradient is rounded before each product with A."""
    SIZE: tl.constexpr = S.K * (S.K + S.V)
    at, chunk, h, _ = row_of_program(table, T, N, NG, S.H, S)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    n = here.local
    m = n // OCTET
    site = chunk.to(tl.int64) * S.H + h
    gradient = tl.zeros([S.C, S.LEVELS], tl.float32)
    acc = tl.zeros([S.C, S.BK], tl.float32)

    slot = path_start(m, at, path_starts, paths, S.PACKED)
    nearest = maps.entries + ((at.chunk0 + m * OCTET - 1).to(tl.int64) * S.HEADS + h) * SIZE
    at_start = octet_queries + site * (S.C * S.K)
    queries = load_block(at_start, S.K, 0, 0, 0, tl.where(m > 0, S.K, 0), S.C, S.C, S.BK, True)
    rest = n - n % OCTET
    # One state arrives while the state before is multiplied. Two maps of the next loop would leave no room for this.
    for j in tl.range(set_bits(m), num_stages=2):
        source = tl.where(j > 0, states + ((slot + j).to(tl.int64) * S.H + h) * SIZE, nearest)
        product = entry_product(x, here, h, source, S)
        share, gain = state_gradient(product, queries, x, here, h, log2_of_power(lowbit(rest)), L, S)
        acc += share
        gradient += gain
        rest &= rest - 1

    rest = n % OCTET
    slot = inner_start(n, at.chunk0) + set_bits(rest)
    for i in range(set_bits(rest // 2)):
        slot -= 1
        place = (slot.to(tl.int64) * S.H + h) * (S.C * S.K)
        tree_level = bit_length(rest) - 1
        rest -= 1 << tree_level
        entry = maps.entries + ((at.chunk0 + n - rest - 1).to(tl.int64) * S.HEADS + h) * SIZE
        if (i > 0) | (m > 0):
            after = acc.to(inner_grads.dtype.element_ty)
            store_part(inner_grads + place, S.K, after, 0, 0, S.C, S.K, S.C, S.BK)
            acc = times_transposed(after, entry, S.K + S.V, S.C, S)
        product = entry_product(x, here, h, entry, S)
        queries = load_part(inner_queries + place, S.K, 0, 0, S.C, S.K, S.C, S.BK)
        share, gain = state_gradient(product, queries, x, here, h, tree_level, L, S)
        acc += share
        gradient += gain
    if n % 2 == 1:
        place = ((slot - 1).to(tl.int64) * S.H + h) * (S.C * S.K)
        if n > 1:  # another entry follows
            store_part(inner_grads + place, S.K, acc, 0, 0, S.C, S.K, S.C, S.BK)
        keys = key_head(x, here, h, S) - S.C * x.stride_k
        sums = maps.sums + h.to(tl.int64) * sums_stride + (here.origin - S.C)
        before = (chunk - 1).to(tl.int64) * S.HEADS + h
        written = maps.writes + before * (S.C * (S.K + S.V))
        decay = whole_decay(sums, S.C - 1, maps.chunk_log, before, S)
        acc, gain = leaf_gradient(acc, inner_queries + place, x, here, h, keys, sums, all_tokens, written, decay, L, S)
        gradient += gain
    store_part(query_grads + site * (S.C * S.K), S.K, acc, 0, 0, S.C, S.K, S.C, S.BK)
    columns = tl.arange(0, S.LEVELS)[None, :]
    rows = tl.arange(0, S.C)[:, None] * out.stride_dscales
    place = out.dscales + here.origin * out.stride_dscales + h * L + (rows + columns)
    tl.store(place, gradient.to(out.dscales.dtype.element_ty), mask=here.valid[:, None] & (columns < L))
