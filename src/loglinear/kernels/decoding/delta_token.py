"""TOKEN of the delta rule: the weights of a query on the open chunk and on the past, before any entry is loaded.

The inverse grows by one row per token, ``T_i = β_i (e_i - Σ_{j<i} z_j T_j)``, so no step solves a system. This is one chain
of small reductions. A separate kernel walks the chain once for all columns of V, and the programs that read the entries
do not pay for its registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.decoding.open_chunk import open_gates, open_scales, open_tile, store_token
from loglinear.kernels.pointwise.functions import inverse_length


@triton.jit
def rounded(rows, like):
    """Float32 numbers as the dtype of ``like`` holds them: a call must use the keys that the state will keep."""
    return rows.to(like.dtype).to(tl.float32)


@triton.jit(do_not_specialize=["T", "L"])
def delta_token_kernel(
    q,
    k,
    g,
    beta,
    level_scales,
    reach,  # [B, T, H, K]: the query that is put to the entries
    read,  # [B, T, H, C]: weights of the open chunk's values
    position,
    open_k,  # [B, G, 2C, K]
    open_g,  # [B, H, 2C]
    open_solve,  # [B, H, 2C, C]
    T,
    L,
    stride_q,
    stride_k,
    stride_g,
    stride_b,
    stride_s,
    factor,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    HAS_GATE: tl.constexpr,
    NORM: tl.constexpr,
):
    """Grid: H x B, heads fastest. float32: everything.

    Races: as in ``scalar_step_kernel``. Rows of the inverse that belong to the call stay in the program that made them.
    """
    pid = tl.program_id(0)
    h = pid % H
    row = (pid // H).to(tl.int64)
    group = h // (H // G)
    seen = tl.load(position + row).to(tl.int32)
    n = seen // C
    head = row * H + h
    open_g += head * (2 * C)
    open_solve += head * (2 * C * C)
    open_k += (row * G + group) * (2 * C * K)

    token = row * T
    q += token * stride_q + group * K
    k += token * stride_k + group * K
    g += token * stride_g + h
    beta += token * stride_b + h
    level_scales += token * stride_s + h * L
    reach += (token * H + h) * K
    read += (token * H + h) * C
    place = tl.arange(0, C)
    rows_k = tl.arange(0, BK)
    square = place[:, None] * C + place[None, :]
    # Row j has no element after j. Rows that are not written yet hold any numbers.
    known = (place[:, None] < seen - n * C) & (place[None, :] <= place[:, None])
    solve = tl.load(open_solve + n % 2 * (C * C) + square, mask=known, other=0.0)
    for t in range(T):
        # All loads come before the first use of any: their latencies are waited for together.
        i = seen + t - n * C
        first = i - t
        half = n % 2 * C
        own = place == i
        given_keys = open_tile(open_k + half * K, k, stride_k, first, i, C, K, BK, 0)
        given_query = tl.load(q + t * stride_q + rows_k, mask=rows_k < K, other=0.0)
        given_key = tl.load(k + t * stride_k + rows_k, mask=rows_k < K, other=0.0)
        strength = tl.load(beta + t * stride_b).to(tl.float32)
        gate = open_gates(i, open_g + half, g, stride_g, first, i, HAS_GATE)
        gates = open_gates(place, open_g + half, g, stride_g, first, i, HAS_GATE)
        next_gates = open_gates(place + 1, open_g + half, g, stride_g, first, i, HAS_GATE)
        scales = open_scales(level_scales + t * stride_s, i, L, C)

        keys = given_keys.to(tl.float32)
        query = given_query.to(tl.float32)
        key = given_key.to(tl.float32)
        if NORM:  # the keys of the state have the dtype in which an earlier step left them
            units = tl.where(place >= first, inverse_length(keys, 1), 1.0)
            keys = rounded(keys * units[:, None], given_keys)
            query = rounded(query * inverse_length(query, 0), given_query)
            key = rounded(key * inverse_length(key, 0), given_key)
        query *= factor
        through = tl.cumsum(gates, axis=0)
        decays = tl.where(place <= i, tl.exp(tl.cumsum(next_gates, axis=0, reverse=True)), 0.0)

        # The rows of the inverse before the token's serve its own row and its query alike: neither waits for the other.
        overlap = tl.where(place < i, tl.sum(keys * key[None, :], axis=1) * decays, 0.0)
        scores = tl.sum(keys * query[None, :], axis=1) * decays
        added = strength * (tl.where(own, 1.0, 0.0) - tl.sum(overlap[:, None] * solve, axis=0))
        weights = tl.sum(scores[:, None] * solve, axis=0) + tl.sum(key * query, axis=0) * added
        solve = tl.where(own[:, None], added[None, :], solve)
        erased = tl.sum((weights * tl.exp(through))[:, None] * keys, axis=0)
        tl.store(read + t * (H * C) + place, weights * scales)
        tl.store(reach + t * (H * K) + rows_k, tl.exp(tl.sum(gates, axis=0)) * query - erased, mask=rows_k < K)

        tl.store(open_g + half + i, gate)
        tl.store(open_solve + (half + i) * C + place, added)
        if h % (H // G) == 0:
            store_token(open_k, half + i, key.to(open_k.dtype.element_ty), rows_k, K)
        if i == C - 1:
            n += 1
            solve = tl.zeros_like(solve)
