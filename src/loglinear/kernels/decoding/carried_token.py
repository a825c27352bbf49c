"""TOKEN of the transitions whose entries are carried: the weights of a query on the open chunk and on the past.

No entry is loaded here. The inverse of a delta rule grows by one row per token, ``T_i = β_i (e_i - Σ_{j<i} z_j T_j)``, so no
step solves a system. This is one chain of small reductions. A separate kernel walks the chain once for all columns of V, and
the programs that read the entries do not pay for its registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.decoding.channels import (
    decays_after,
    decays_through,
    four_keys,
    four_products,
    four_rows,
    four_weighted,
    rounded,
)
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
def products(keys, row, decays, S: tl.constexpr):
    """Products ``[C]`` of a row ``[BK]`` with decayed keys; one decay for each key, or as ``channels.py`` has them."""
    if S.GATES == 1:
        found = tl.sum(keys * row[None, :], axis=1) * decays
    else:
        found = four_products(keys, row, decays, S)
    return found


@triton.jit
def weighted_sum(keys, weights, decays, S: tl.constexpr):
    """``Σ_j weights_j decays_j keys_j`` ``[BK]``, decays as in ``products``."""
    if S.GATES == 1:
        found = tl.sum((weights * decays)[:, None] * keys, axis=0)
    else:
        found = four_weighted(keys, weights, decays, S)
    return found


@triton.jit(do_not_specialize=["T", "L"])
def carried_token_kernel(x, held, reach, read, T, L, S: tl.constexpr, NORM: tl.constexpr):
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
    # Row j has no element after j. Rows that are not written yet hold any numbers.
    known = (place[:, None] < seen - n * S.C) & (place[None, :] <= place[:, None])
    if S.DELTA:
        square = place[:, None] * S.C + place[None, :]
        solve = tl.load(held.open_solve + n % 2 * (S.C * S.C) + square, mask=known, other=0.0)
    units = tl.full([S.C], 1.0, tl.float32)  # factors of the call's keys
    for t in range(T):
        # All loads come before the first use of any: their latencies are waited for together.
        i = seen + t - n * S.C
        first = i - t
        half = n % 2 * S.C
        new = place == i
        stored_keys, stored_gates = held.open_k + half * S.K, held.open_g + half * S.GATES
        given_query = tl.load(q + t * x.stride_q + rows_k, mask=rows_k < S.K, other=0.0)
        given_key = tl.load(k + t * x.stride_k + rows_k, mask=rows_k < S.K, other=0.0)
        scales = open_scales(level_scales + t * x.stride_scales, i, L, S.C)
        if S.DELTA:
            strength = tl.load(beta + t * x.stride_beta).to(tl.float32)
        if S.GATES == 1:
            given_keys = open_tile(stored_keys, k, x.stride_k, first, i, S.C, S.K, S.BK, 0)
            gate = open_gates(i, stored_gates, g, x, first, i)
            gates = open_gates(place, stored_gates, g, x, first, i)
            next_gates = open_gates(place + 1, stored_gates, g, x, first, i)
            decays = tl.where(place <= i, tl.exp(tl.cumsum(next_gates, axis=0, reverse=True)), 0.0)
            whole = tl.exp(tl.sum(gates, axis=0))
        else:
            given_keys = four_rows(stored_keys, k, x.stride_k, first, i, S)
            gates = four_rows(stored_gates, g, x.stride_g, first, i, S)
            gate = tl.load(g + t * x.stride_g + rows_k, mask=rows_k < S.K, other=0.0)
            decays = decays_after(gates)
            whole = tl.exp(tl.sum(gates.a + gates.b + gates.c + gates.d, axis=0))

        query = given_query.to(tl.float32)
        key = given_key.to(tl.float32)
        if NORM:  # the keys of the state have the dtype in which an earlier step left them
            unit = inverse_length(key, 0)
            units = tl.where(new, unit, units)
            query = rounded(query * inverse_length(query, 0), given_query)
            key = rounded(key * unit, given_key)
        query *= x.factor
        if S.GATES == 1:
            keys = given_keys.to(tl.float32)
            if NORM:
                keys = rounded(keys * units[:, None], given_keys)
        else:
            keys = four_keys(given_keys, units, S, NORM)
        weights = products(keys, query, decays, S)
        past = whole * query
        if S.DELTA:
            # The rows of the inverse before the token's serve its own row and its query alike: neither waits for the other.
            overlap = tl.where(place < i, products(keys, key, decays, S), 0.0)
            added = strength * (tl.where(new, 1.0, 0.0) - tl.sum(overlap[:, None] * solve, axis=0))
            weights = tl.sum(weights[:, None] * solve, axis=0) + tl.sum(key * query, axis=0) * added
            solve = tl.where(new[:, None], added[None, :], solve)
            tl.store(held.open_solve + (half + i) * S.C + place, added)
            if S.GATES == 1:
                through = tl.exp(tl.cumsum(gates, axis=0))
            else:
                through = decays_through(gates)
            past -= weighted_sum(keys, weights, through, S)
        tl.store(read + t * (S.H * S.C) + place, weights * scales)
        tl.store(reach + t * (S.H * S.K) + rows_k, past, mask=rows_k < S.K)

        if S.GATES == 1:
            tl.store(stored_gates + i, gate)
        else:
            store_token(stored_gates, i, gate, rows_k, S.K)
        if own.h % (S.H // S.G) == 0:
            store_token(held.open_k, half + i, key.to(held.open_k.dtype.element_ty), rows_k, S.K)
        if i == S.C - 1:
            n += 1
            units = tl.full([S.C], 1.0, tl.float32)
            if S.DELTA:
                solve = tl.zeros_like(solve)
