"""LEAF: the entry of a single chunk, which is met as two thin products and never made.

Every odd chunk reads the one before it as the nearest entry of its path, so these are half of all entries. With
``G = Q K_endᵀ`` over that chunk's keys, ``Q S = G U`` and ``Q A = γ_C Q - G W``: what it left as T, W and U is enough. Nor is
its gradient made. One chunk alone reads it, so what it gives to W, U and K_end is three more thin products of the reader.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.common import load_tile
from loglinear.kernels.delta_rule.group_maps import decay_to_end
from loglinear.kernels.delta_rule.products import times_tokens
from loglinear.kernels.delta_rule.tiles import load_part, store_part


@triton.jit
def leaf_scores(queries, keys, stride_k, sums, plane, C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
                EXACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``Q K_endᵀ`` ``[C, C]`` float32; keys and sums point at the first token of a whole chunk."""
    everywhere = tl.arange(0, C) >= 0
    pairs = times_tokens(queries, keys, stride_k, everywhere, C, K, BK, PRECISION)
    return pairs * decay_to_end(sums, C, plane, C, EXACT)[None, :]


@triton.jit
def leaf_jump(queries, pairs, sums, erased, C: tl.constexpr, PRECISION: tl.constexpr):
    """``Q A`` ``[C, BK]`` in Q's dtype, from ``pairs = Q K_endᵀ`` and ``erased = W``; sums point at the chunk's first token."""
    passed = queries.to(tl.float32) * tl.exp2(tl.load(sums + C - 1))
    return tl.dot(-pairs.to(queries.dtype), erased, passed, input_precision=PRECISION).to(queries.dtype)


@triton.jit
def leaf_shares(queries, grads, pairs, dpairs, scale, do_head, stride_do, valid, keys, values, trace, C: tl.constexpr,
                K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Write the leaf's part of the gradients of W and K_end ``[2, C, K]``, of U ``[V, C]``, and the trace of that of A.

    queries, grads: where Q and the gradient of Q A are. pairs: ``Q K_endᵀ``, and dpairs its gradient, low. scale: λ ``[C]``.
    """
    before = load_part(queries, 0, 0, K, C, K, C, BK)
    store_part(keys + C * K, tl.dot(tl.trans(dpairs), before, input_precision=PRECISION), 0, 0, K, C, K, C, BK)
    after = load_part(grads, 0, 0, K, C, K, C, BK)
    tl.store(trace, tl.sum(before.to(tl.float32) * after.to(tl.float32)))
    store_part(keys, -tl.dot(tl.trans(pairs), after, input_precision=PRECISION), 0, 0, K, C, K, C, BK)
    for first in range(0, V, BV):
        do_tile = load_tile(do_head, stride_do, valid, C, V, BV, first)
        weighted = (do_tile.to(tl.float32) * scale[:, None]).to(do_tile.dtype)
        store_part(values, tl.dot(tl.trans(weighted), pairs, input_precision=PRECISION), first, 0, C, V, C, BV, C)
