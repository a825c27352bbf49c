"""TOKEN of the delta rule: the weights of a query on the open chunk and on the past, before any entry is loaded.

The inverse grows by one row per token, ``T_i = β_i (e_i - Σ_{j<i} z_j T_j)``, so no step solves a system. This is one chain
of small reductions. A separate kernel walks the chain once for all columns of V, and the programs that read the entries
do not pay for its registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.decoding.open_chunk import (
    at_head,
    at_token,
    open_gates,
    open_scales,
    open_tile,
    program_of,
    store_token,
)
from loglinear.kernels.pointwise.functions import inverse_length


@triton.jit
def rounded(rows, like):
    """Float32 numbers as the dtype of ``like`` holds them: a call must use the keys that the state will keep."""
    return rows.to(like.dtype).to(tl.float32)


@triton.jit(do_not_specialize=["T", "L"])
def delta_token_kernel(x, held, reach, read, T, L, S: tl.constexpr, NORM: tl.constexpr):
    """reach ``[B, T, H, K]``: the query that is put to the entries; read ``[B, T, H, C]``: weights of the open chunk's values.

    Grid: H x B, heads fastest (S.BV = S.V). float32: everything. Races: as in ``scalar_step_kernel``. Rows of the inverse that
    belong to the call stay in the program that made them.
    """
    own = program_of(S)
    held = at_head(held, own, 0, S)
    seen = tl.load(held.position).to(tl.int32)
    n = seen // S.C

    q, k, _, g, beta, level_scales = at_token(x, own, T, L, S)
    head = own.row * T * S.H + own.h
    reach += head * S.K
    read += head * S.C
    place = tl.arange(0, S.C)
    rows_k = tl.arange(0, S.BK)
    square = place[:, None] * S.C + place[None, :]
    # Row j has no element after j. Rows that are not written yet hold any numbers.
    known = (place[:, None] < seen - n * S.C) & (place[None, :] <= place[:, None])
    solve = tl.load(held.open_solve + n % 2 * (S.C * S.C) + square, mask=known, other=0.0)
    for t in range(T):
        # All loads come before the first use of any: their latencies are waited for together.
        i = seen + t - n * S.C
        first = i - t
        half = n % 2 * S.C
        new = place == i
        given_keys = open_tile(held.open_k + half * S.K, k, x.stride_k, first, i, S.C, S.K, S.BK, 0)
        given_query = tl.load(q + t * x.stride_q + rows_k, mask=rows_k < S.K, other=0.0)
        given_key = tl.load(k + t * x.stride_k + rows_k, mask=rows_k < S.K, other=0.0)
        strength = tl.load(beta + t * x.stride_beta).to(tl.float32)
        gate = open_gates(i, held.open_g + half, g, x, first, i)
        gates = open_gates(place, held.open_g + half, g, x, first, i)
        next_gates = open_gates(place + 1, held.open_g + half, g, x, first, i)
        scales = open_scales(level_scales + t * x.stride_scales, i, L, S.C)

        keys = given_keys.to(tl.float32)
        query = given_query.to(tl.float32)
        key = given_key.to(tl.float32)
        if NORM:  # the keys of the state have the dtype in which an earlier step left them
            units = tl.where(place >= first, inverse_length(keys, 1), 1.0)
            keys = rounded(keys * units[:, None], given_keys)
            query = rounded(query * inverse_length(query, 0), given_query)
            key = rounded(key * inverse_length(key, 0), given_key)
        query *= x.factor
        through = tl.cumsum(gates, axis=0)
        decays = tl.where(place <= i, tl.exp(tl.cumsum(next_gates, axis=0, reverse=True)), 0.0)

        # The rows of the inverse before the token's serve its own row and its query alike: neither waits for the other.
        overlap = tl.where(place < i, tl.sum(keys * key[None, :], axis=1) * decays, 0.0)
        scores = tl.sum(keys * query[None, :], axis=1) * decays
        added = strength * (tl.where(new, 1.0, 0.0) - tl.sum(overlap[:, None] * solve, axis=0))
        weights = tl.sum(scores[:, None] * solve, axis=0) + tl.sum(key * query, axis=0) * added
        solve = tl.where(new[:, None], added[None, :], solve)
        erased = tl.sum((weights * tl.exp(through))[:, None] * keys, axis=0)
        tl.store(read + t * (S.H * S.C) + place, weights * scales)
        tl.store(reach + t * (S.H * S.K) + rows_k, tl.exp(tl.sum(gates, axis=0)) * query - erased, mask=rows_k < S.K)

        tl.store(held.open_g + half + i, gate)
        tl.store(held.open_solve + (half + i) * S.C + place, added)
        if own.h % (S.H // S.G) == 0:
            store_token(held.open_k, half + i, key.to(held.open_k.dtype.element_ty), rows_k, S.K)
        if i == S.C - 1:
            n += 1
            solve = tl.zeros_like(solve)
