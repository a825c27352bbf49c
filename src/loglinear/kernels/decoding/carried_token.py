"""TOKEN of the transitions whose entries are carried: the weights of a query on the open chunk and on the past.

No entry is loaded here. A separate kernel walks the open chunk once for all columns of V, and the programs that read the
entries do not pay for its registers. The inverse of a delta rule grows by one row per token,
``T_i = β_i (e_i - Σ_{j<i} z_j T_j)``, so no step solves a system.

The walk goes from the newest token back to the oldest, and then has at hand what a token needs. Decays from after a token are
sums over what was passed. A row of the inverse ends at its diagonal, so weights of earlier tokens do not change later ones. The
query that reaches the past is ``p <- γ_j (p - w_j k_j)``. The newest token has ``w_i = β_i k_iᵀ q``, and all other weights are
those of the first p. One warp holds all channels of a token: no number waits for another warp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.decoding.open_chunk import at_head, at_token, pick, program_of, store_token
from loglinear.kernels.pointwise.functions import inverse_length
from loglinear.kernels.tree.dependent import launch_dependents

TOKENS = tl.constexpr(4)  # under way together


@triton.jit
def rounded(row, like):
    """Float32 numbers as the dtype of ``like`` holds them: a call must use the keys that the state will keep."""
    return row.to(like.dtype).to(tl.float32)


@triton.jit
def open_row(place, columns, stored, given, stride, first, WIDTH: tl.constexpr):
    """Row ``place`` of keys or gates: of the call from place ``first`` on, else of the state. Zero before the chunk."""
    row = tl.where(place >= first, given + (place - first) * stride, stored + place * WIDTH)
    return tl.load(row + columns, mask=(columns < WIDTH) & (place >= 0), other=0.0)


@triton.jit(do_not_specialize=["T"])
def carried_token_kernel(
    x, held, reach, read, positions, T, S: tl.constexpr, NORM: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr
):
    """reach ``[B, T, H, K]``: the query that is put to the entries; read ``[B, T, H, C]``: weights of the open chunk's
    values, before λ; positions int32 ``[B]``, side by side.

    Grid: H x B, heads fastest (S.BV = S.V). float32: everything. Races: as in ``scalar_step_kernel``. Gates and rows of the
    inverse belong to the program of their head.
    """
    if EARLY:
        launch_dependents()
    own = program_of(S)
    held = at_head(held, own, 0, S)
    seen = tl.load(held.position).to(tl.int32)
    n = seen // S.C

    q, k, _, g, beta, _ = at_token(x, own, T, 0, S)
    head = own.row * T * S.H + own.h
    reach += head * S.K
    read += head * S.C
    places, columns = tl.arange(0, S.C), tl.arange(0, S.BK)
    channels = tl.arange(0, 1 if S.GATES == 1 else S.BK)
    for t in range(T):
        i = seen + t - n * S.C
        first = i - t
        half = n % 2 * S.C
        stored_keys, stored_gates = held.open_k + half * S.K, held.open_g + half * S.GATES
        solve = held.open_solve + half * S.C
        given_query = tl.load(q + t * x.stride_q + columns, mask=columns < S.K, other=0.0)
        given_key = tl.load(k + t * x.stride_k + columns, mask=columns < S.K, other=0.0)
        later = tl.zeros(channels.shape, tl.float32)  # log decays from after the tokens of the walk
        if x.g is not None:
            later += tl.load(g + t * x.stride_g + channels, mask=channels < S.GATES, other=0.0)
        query, key = given_query.to(tl.float32), given_key.to(tl.float32)
        if NORM:
            query = rounded(query * inverse_length(query, 0), given_query)
            key = rounded(key * inverse_length(key, 0), given_key)
        query *= x.factor
        store_token(stored_gates, i, later, channels, S.GATES)
        if own.h % (S.H // S.G) == 0:
            store_token(held.open_k, half + i, key.to(held.open_k.dtype.element_ty), columns, S.K)
        weight = tl.sum(query * key, axis=0)
        if S.DELTA:
            strength = tl.load(beta + t * x.stride_beta).to(tl.float32)
            weight *= strength
            query -= weight * key
        past = query * tl.exp(later)

        weights, erased = tl.zeros([S.C], tl.float32), tl.zeros([S.C], tl.float32)
        for step in tl.range((i + TOKENS - 1) // TOKENS, num_stages=STAGES):
            for s in tl.static_range(TOKENS):
                j = i - 1 - s - step * TOKENS
                row = open_row(j, columns, stored_keys, k, x.stride_k, first, S.K)
                if x.g is None:
                    gate = open_row(j, channels, stored_gates, stored_gates, 0, S.C, S.GATES)
                else:
                    gate = open_row(j, channels, stored_gates, g, x.stride_g, first, S.GATES)
                earlier = row.to(tl.float32)
                if NORM:  # the keys of the state have the dtype in which an earlier step left them
                    earlier = rounded(earlier * tl.where(j < first, 1.0, inverse_length(earlier, 0)), row)
                decayed = earlier * tl.exp(later)
                found = tl.sum(decayed * query, axis=0)
                if S.DELTA:
                    # A row has no element after its diagonal. Its later places hold any numbers.
                    inverse = tl.load(solve + j * S.C + places, mask=(places <= j), other=0.0)
                    weights += found * inverse
                    erased += tl.sum(decayed * key, axis=0) * inverse
                    past -= pick(weights, j) * earlier
                else:
                    weights = tl.where(places == j, found, weights)
                past *= tl.exp(gate)
                later += gate
        if S.DELTA:
            added = strength * (tl.where(places == i, 1.0, 0.0) - erased)
            tl.store(solve + i * S.C + places, added)
            tl.debug_barrier()  # the next token of the call reads the row
        tl.store(read + t * (S.H * S.C) + places, tl.where(places == i, weight, weights))
        tl.store(reach + t * (S.H * S.K) + columns, past, mask=columns < S.K)
        if i == S.C - 1:
            n += 1
    if own.h == 0:
        tl.store(positions + own.row, seen)
