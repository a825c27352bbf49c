"""STEP of the delta rule: as the scalar gate's, with a row of the triangular inverse for each token.

Special about this file: the inverse grows by a row a token, ``T_i = β_i (e_i - Σ_{j<i} z_j T_j)``, so that no step solves
anything; and no K x K matrix is made: where the chunk closes, ``X <- γ X - K_endᵀ (T diag(γ_j) K) X`` is taken from the right.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.common import inverse_length, load_state, log2_of_power, lowbit, path_length, store_state
from loglinear.kernels.decoding.open_chunk import (
    entry_scales,
    held_slots,
    open_decays,
    open_gates,
    open_scales,
    open_tile,
    store_token,
    weighted_entries,
)


@triton.jit
def rounded(rows, like):
    """Float32 numbers as the dtype of ``like`` holds them: a call must use the keys that the state will keep."""
    return rows.to(like.dtype).to(tl.float32)


@triton.jit
def load_row(base, inside, offsets, NORM: tl.constexpr):
    """One row ``[BK]`` of q or k as float32, of unit length with NORM."""
    value = tl.load(base + offsets, mask=inside, other=0.0)
    row = value.to(tl.float32)
    return rounded(row * inverse_length(row, 0), value) if NORM else row


@triton.jit
def load_keys(stored, given, stride, first, i, units, K: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, column,
              NORM: tl.constexpr):  # fmt: skip
    """Columns of the open chunk's keys ``[C, TILE]``, float32; with NORM those of the call times ``units [C]``."""
    tile = open_tile(stored, given, stride, first, i, C, K, TILE, column)
    return rounded(tile.to(tl.float32) * units[:, None], tile) if NORM else tile.to(tl.float32)


@triton.jit
def sum_of_slots(entries, lowest, count, first_k, first_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                 BV: tl.constexpr):  # fmt: skip
    """``[BK, BV]`` of the sum of ``count`` slots from ``lowest`` on."""
    state = tl.zeros([BK, BV], tl.float32)
    for m in tl.range(lowest, lowest + count, num_stages=1):
        state += load_state(entries + m * (K * V), first_k, first_v, K, V, BK, BV).to(tl.float32)
    return state


@triton.jit
def close_chunk(entries, stored, given, stride, first, units, values, solve, through, after, whole, n, M, first_v,
                C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                NORM: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Carry every entry over chunk n, ``X -> γ X + K_endᵀ T (V - diag(γ_j) K X)``, V only for the entry that is made.

    That one starts from the sum of those that merge: the map is linear. Keys and entries come in blocks of BLOCK rows: all
    products are C x C x BV, and shared memory is left for other programs. A slot past the buffers is neither read
    nor written.
    """
    BLOCK: tl.constexpr = BK if BK < 64 else 64
    to_end = tl.exp(after)
    from_start = tl.exp(through)
    decay = tl.exp(whole)
    slot = log2_of_power(lowbit(n + 1))
    lowest = 0
    count = tl.minimum(slot, M)
    rest = held_slots(n & -lowbit(n + 1), M)  # the entries that only age
    for _ in tl.range(path_length(rest, 0) + 1, num_stages=1):
        known = tl.zeros([C, BV], tl.float32)
        for first_k in tl.range(0, K, BLOCK, num_stages=1):
            keys = load_keys(stored, given, stride, first, C - 1, units, K, C, BLOCK, first_k, NORM)
            state = sum_of_slots(entries, lowest, count, first_k, first_v, K, V, BLOCK, BV)
            known += tl.dot(keys, state, input_precision=PRECISION)
        wrong = tl.dot(solve, values - from_start[:, None] * known, input_precision=PRECISION)
        for first_k in tl.range(0, K, BLOCK, num_stages=1):
            keys = load_keys(stored, given, stride, first, C - 1, units, K, C, BLOCK, first_k, NORM)
            state = decay * sum_of_slots(entries, lowest, count, first_k, first_v, K, V, BLOCK, BV)
            state += tl.dot(tl.trans(keys * to_end[:, None]), wrong, input_precision=PRECISION)
            store_state(entries + slot * (K * V), state, slot < M, first_k, first_v, K, V, BLOCK, BV)
        values = tl.zeros_like(values)
        slot = log2_of_power(lowbit(rest))
        rest = rest & (rest - 1)
        lowest = slot
        count = 1


@triton.jit(do_not_specialize=["T", "L", "M"])
def delta_step_kernel(
    q,
    k,
    v,
    g,
    beta,
    level_scales,
    o,
    position,
    entries,  # [B, H, M, K, V]
    open_k,  # [B, G, 2C, K]
    open_v,  # [B, H, C, V]
    open_g,  # [B, H, 2C]
    open_solve,  # [B, H, 2C, C]
    T,
    L,
    M,
    stride_q,
    stride_k,
    stride_v,
    stride_g,
    stride_b,
    stride_s,
    factor,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LOG_C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_GATE: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: tiles of V x H x B, tiles fastest. float32: everything.

    Races: as in ``scalar_step_kernel``. Rows of the inverse that belong to the call stay in the program that made them; each
    program makes the same ones, and the first tile writes them.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    first_v = pid % TILES * BV
    h = pid // TILES % H
    row = (pid // (TILES * H)).to(tl.int64)
    group = h // (H // G)
    seen = tl.load(position + row).to(tl.int32)
    n = seen // C
    head = row * H + h
    entries += head * M * (K * V)
    open_v += head * (C * V)
    open_g += head * (2 * C)
    open_solve += head * (2 * C * C)
    open_k += (row * G + group) * (2 * C * K)

    token = row * T
    q += token * stride_q + group * K
    k += token * stride_k + group * K
    v += token * stride_v + h * V
    g += token * stride_g + h
    beta += token * stride_b + h
    o += token * (H * V) + h * V
    level_scales += token * stride_s + h * L
    place = tl.arange(0, C)
    rows_k = tl.arange(0, BK)
    columns = first_v + tl.arange(0, BV)
    square = place[:, None] * C + place[None, :]
    # Row j has no element after j, and of rows not written yet nothing is known.
    known = (place[:, None] < seen - n * C) & (place[None, :] <= place[:, None])
    solve = tl.load(open_solve + n % 2 * (C * C) + square, mask=known, other=0.0)
    for t in range(T):
        i = seen + t - n * C
        first = i - t
        half = n % 2 * C
        units = tl.zeros([C], tl.float32) + 1.0
        keys = load_keys(open_k + half * K, k, stride_k, first, i, units, K, C, BK, 0, False)
        if NORM:
            units = tl.where(place >= first, inverse_length(keys, 1), 1.0)
            keys = load_keys(open_k + half * K, k, stride_k, first, i, units, K, C, BK, 0, True)
        values = open_tile(open_v, v, stride_v, first, i, C, V, BV, first_v).to(tl.float32)
        query = load_row(q + t * stride_q, rows_k < K, rows_k, NORM) * factor
        key = load_row(k + t * stride_k, rows_k < K, rows_k, NORM)
        through, after = open_decays(open_g + half, g, stride_g, first, i, HAS_GATE, C)
        whole = tl.sum(tl.where(place == i, through, 0.0), axis=0)
        scales = level_scales + t * stride_s

        decays = tl.where(place <= i, tl.exp(after), 0.0)
        overlap = tl.where(place < i, tl.sum(keys * key[None, :], axis=1) * decays, 0.0)
        strength = tl.load(beta + t * stride_b).to(tl.float32)
        added = strength * (tl.where(place == i, 1.0, 0.0) - tl.sum(overlap[:, None] * solve, axis=0))
        solve = tl.where((place == i)[:, None], added[None, :], solve)
        scores = tl.sum(keys * query[None, :], axis=1) * decays
        read = tl.sum(scores[:, None] * solve, axis=0)

        out = tl.sum((read * open_scales(scales, i, L, C))[:, None] * values, axis=0)
        erased = tl.sum((read * tl.exp(through))[:, None] * keys, axis=0)
        past = weighted_entries(
            entries, entry_scales(scales, n, L, LOG_C), held_slots(n, M), first_v, K, V, BK, BV, STAGES
        )
        out += tl.sum((tl.exp(whole) * query - erased)[:, None] * past, axis=0)
        tl.store(o + t * (H * V) + columns, out.to(o.dtype.element_ty), mask=columns < V)

        value = tl.load(v + t * stride_v + columns, mask=columns < V, other=0.0)
        store_token(open_v, i, value, columns, V)
        if first_v == 0:
            tl.store(open_g + half + i, open_gates(i, open_g + half, g, stride_g, first, i, HAS_GATE))
            tl.store(open_solve + (half + i) * C + place, added)
            if h % (H // G) == 0:
                store_token(open_k, half + i, key.to(open_k.dtype.element_ty), rows_k, K)
        if i == C - 1:
            close_chunk(entries, open_k + half * K, k, stride_k, first, units, values, solve, through, after, whole, n, M,
                        first_v, C, K, V, BK, BV, NORM, PRECISION)  # fmt: skip
            n += 1
            solve = tl.zeros_like(solve)
            tl.debug_barrier()  # later tokens of the call read the entries, and may overwrite places of v
