"""STEP of the scalar gate: read the open chunk and the live entries, write one token, and close the chunk once in C tokens.

A step writes an entry only when a chunk closes. For all other entries it updates the log of the decay alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.decoding.open_chunk import (
    SLOTS,
    entry_scales,
    held_slots,
    open_decays,
    open_gates,
    open_scales,
    open_tile,
    pick,
    store_token,
    weighted_entries,
)
from loglinear.kernels.tree.place import log2_of_power, lowbit
from loglinear.kernels.tree.tiles import load_state, store_state


@triton.jit
def close_chunk(entries, stored, given, stride, first, v_tile, after, logs, n, M, first_v, C: tl.constexpr,
                K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Turn chunk n into an entry and merge it with the entries of its size; returns the slot that now holds it.

    logs ``[SLOTS]``: log decay from every entry to the end of chunk n. Keys and entries come in blocks of BLOCK rows, which
    leaves registers and shared memory for other programs. A slot past the buffers is neither read nor written.
    """
    BLOCK: tl.constexpr = BK if BK < 64 else 64
    weighted = (v_tile.to(tl.float32) * tl.exp(after)[:, None]).to(v_tile.dtype)
    carried = tl.exp(logs)
    slot = log2_of_power(lowbit(n + 1))
    for first_k in tl.range(0, K, BLOCK, num_stages=1):
        k_tile = open_tile(stored, given, stride, first, C - 1, C, K, BLOCK, first_k)
        state = tl.dot(tl.trans(k_tile), weighted, input_precision=PRECISION)
        for m in tl.range(tl.minimum(slot, M), num_stages=1):
            earlier = load_state(entries + m * (K * V), first_k, first_v, K, V, BLOCK, BV)
            state += pick(carried, m) * earlier.to(tl.float32)
        store_state(entries + slot * (K * V), state, slot < M, first_k, first_v, K, V, BLOCK, BV)
    return slot


@triton.jit(do_not_specialize=["T", "L", "M"])
def scalar_step_kernel(
    q,
    k,
    v,
    g,
    level_scales,
    o,
    position,
    entries,  # [B, H, M, K, V]
    decay,  # [B, 2, H, M]
    open_k,  # [B, G, 2C, K]
    open_v,  # [B, H, C, V]
    open_g,  # [B, H, 2C]
    T,
    L,
    M,
    stride_q,
    stride_k,
    stride_v,
    stride_g,
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
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: tiles of V x H x B, tiles fastest. float32: scores, decays, sums; the chunk's own product takes the inputs' dtype.

    Races: programs of one row share ``open_k``, ``open_g`` and ``decay``. Only one program writes each, and only where no
    program of this launch reads: a token of the call is read from the inputs, and the tokens and decays of the next chunk
    go to the half that chunk n does not use. ``entries`` and ``open_v`` are written by the program that owns the columns.
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
    open_k += (row * G + group) * (2 * C * K)
    decay += (row * 2 * H + h) * M
    slots = tl.arange(0, SLOTS)
    logs = tl.load(decay + n % 2 * H * M + slots, mask=((n >> slots) & 1 == 1) & (slots < M), other=0.0)

    token = row * T
    q += token * stride_q + group * K
    k += token * stride_k + group * K
    v += token * stride_v + h * V
    g += token * stride_g + h
    o += token * (H * V) + h * V
    level_scales += token * stride_s + h * L
    rows_k = tl.arange(0, BK)
    columns = first_v + tl.arange(0, BV)
    for t in range(T):
        i = seen + t - n * C
        first = i - t
        half = n % 2 * C
        k_tile = open_tile(open_k + half * K, k, stride_k, first, i, C, K, BK, 0)
        v_tile = open_tile(open_v, v, stride_v, first, i, C, V, BV, first_v)
        query = tl.load(q + t * stride_q + rows_k, mask=rows_k < K, other=0.0).to(tl.float32) * factor
        through, after = open_decays(open_g + half, g, stride_g, first, i, HAS_GATE, C)
        whole = tl.sum(tl.where(tl.arange(0, C) == i, through, 0.0), axis=0)
        scales = level_scales + t * stride_s
        scores = tl.sum(k_tile.to(tl.float32) * query[None, :], axis=1)
        weights = scores * tl.exp(after) * open_scales(scales, i, L, C)
        out = tl.sum(weights[:, None] * v_tile.to(tl.float32), axis=0)
        past = weighted_entries(entries, entry_scales(scales, n, L, LOG_C) * tl.exp(whole + logs), held_slots(n, M),
                                first_v, K, V, BK, BV, STAGES)  # fmt: skip
        out += tl.sum(query[:, None] * past, axis=0)
        tl.store(o + t * (H * V) + columns, out.to(o.dtype.element_ty), mask=columns < V)

        value = tl.load(v + t * stride_v + columns, mask=columns < V, other=0.0)
        store_token(open_v, i, value, columns, V)
        if first_v == 0:
            tl.store(open_g + half + i, open_gates(i, open_g + half, g, stride_g, first, i, HAS_GATE))
            if h % (H // G) == 0:
                key = tl.load(k + t * stride_k + rows_k, mask=rows_k < K, other=0.0)
                store_token(open_k, half + i, key, rows_k, K)
        if i == C - 1:
            slot = close_chunk(entries, open_k + half * K, k, stride_k, first, v_tile, after, whole + logs, n, M, first_v,
                               C, K, V, BK, BV, PRECISION)  # fmt: skip
            n += 1
            logs = tl.where((slots > slot) & ((n >> slots) & 1 == 1), whole + logs, 0.0)
            if first_v == 0:
                tl.store(decay + n % 2 * H * M + slots, logs, mask=slots < M)
            tl.debug_barrier()  # later tokens of the call read the entry, and may overwrite places of v
