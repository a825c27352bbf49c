"""STEP of the scalar gate: read the open chunk and the live entries, write one token, and close the chunk once in C tokens.

A step writes an entry only when a chunk closes. For all other entries it updates the log of the decay alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from loglinear.kernels.decoding.open_chunk import (
    SLOTS,
    at_head,
    at_token,
    entry_scales,
    held_slots,
    open_decays,
    open_gates,
    open_scales,
    open_tile,
    pick,
    program_of,
    store_token,
    weighted_entries,
)
from loglinear.kernels.tree.dependent import launch_dependents, wait
from loglinear.kernels.tree.place import log2_of_power, lowbit
from loglinear.kernels.tree.tiles import load_state, store_state


@triton.jit
def close_chunk(held, k, stride, first, half, v_tile, after, logs, n, M, first_v, S: tl.constexpr):
    """Turn chunk n into an entry and merge it with the entries of its size; returns the slot that now holds it.

    logs ``[SLOTS]``: log decay from every entry to the end of chunk n. Keys and entries come in blocks of BLOCK rows, which
    leaves registers and shared memory for other programs. A slot past the buffers is neither read nor written.
    """
    BLOCK: tl.constexpr = S.BK if S.BK < 64 else 64
    weighted = (v_tile.to(tl.float32) * tl.exp(after)[:, None]).to(v_tile.dtype)
    carried = tl.exp(logs)
    slot = log2_of_power(lowbit(n + 1))
    for first_k in tl.range(0, S.K, BLOCK, num_stages=1):
        k_tile = open_tile(held.open_k + half * S.K, k, stride, first, S.C - 1, S.C, S.K, BLOCK, first_k)
        state = tl.dot(tl.trans(k_tile), weighted, input_precision=S.PRECISION)
        for m in tl.range(tl.minimum(slot, M), num_stages=1):
            earlier = load_state(held.entries + m * (S.K * S.V), first_k, first_v, S.K, S.V, BLOCK, S.BV)
            state += pick(carried, m) * earlier.to(tl.float32)
        store_state(held.entries + slot * (S.K * S.V), state, slot < M, first_k, first_v, S.K, S.V, BLOCK, S.BV)
    return slot


class Gate(NamedTuple):
    """The tensors of ``(o + D · skip) · silu(gate)``, and the distances of their rows."""

    skip: Any  # [B, T, H * V]
    D: Any  # [H]
    gate: Any  # [B, T, H * V]
    stride_skip: Any
    stride_gate: Any


@triton.jit
def gated(out, gate, token, h, columns, S: tl.constexpr):
    """The output of a head behind its skip and its gate."""
    place, inside = h * S.V + columns, columns < S.V
    skip = tl.load(gate.skip + token * gate.stride_skip + place, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(gate.gate + token * gate.stride_gate + place, mask=inside, other=0.0).to(tl.float32)
    return (out + tl.load(gate.D + h).to(tl.float32) * skip) * (z * tl.sigmoid(z))


@triton.jit(do_not_specialize=["T", "L", "M"])
def scalar_step_kernel(x, held, gate, o, T, L, M, S: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr):
    """Grid: ``program_of``. float32: scores, decays, sums; the chunk's own product takes the inputs' dtype.

    gate: a ``Gate``, or None for o itself.

    Races: programs of one row share ``open_k``, ``open_g`` and ``decay``. Only one program writes each, and only where no
    program of this launch reads: a token of the call is read from the inputs, and the tokens and decays of the next chunk
    go to the half that chunk n does not use. ``entries`` and ``open_v`` are written by the program that owns the columns.
    """
    if EARLY:
        launch_dependents()
        wait()
    own = program_of(S)
    first_v = own.first_v
    held = at_head(held, own, M, S)
    seen = tl.load(held.position).to(tl.int32)
    n = seen // S.C
    slots = tl.arange(0, SLOTS)
    logs = tl.load(held.decay + n % 2 * S.H * M + slots, mask=((n >> slots) & 1 == 1) & (slots < M), other=0.0)

    q, k, v, g, _, level_scales = at_token(x, own, T, L, S)
    o += own.row * T * (S.H * S.V) + own.h * S.V
    rows_k = tl.arange(0, S.BK)
    columns = first_v + tl.arange(0, S.BV)
    for t in range(T):
        i = seen + t - n * S.C
        first = i - t
        half = n % 2 * S.C
        k_tile = open_tile(held.open_k + half * S.K, k, x.stride_k, first, i, S.C, S.K, S.BK, 0)
        v_tile = open_tile(held.open_v, v, x.stride_v, first, i, S.C, S.V, S.BV, first_v)
        query = tl.load(q + t * x.stride_q + rows_k, mask=rows_k < S.K, other=0.0).to(tl.float32) * x.factor
        through, after = open_decays(held.open_g + half, g, x, first, i, S.C)
        whole = tl.sum(tl.where(tl.arange(0, S.C) == i, through, 0.0), axis=0)
        scales = level_scales + t * x.stride_scales
        scores = tl.sum(k_tile.to(tl.float32) * query[None, :], axis=1)
        weights = scores * tl.exp(after) * open_scales(scales, i, L, S.C)
        out = tl.sum(weights[:, None] * v_tile.to(tl.float32), axis=0)
        weights = entry_scales(scales, n, L, S.LOG_C) * tl.exp(whole + logs)
        past = weighted_entries(held.entries, weights, held_slots(n, M), first_v, S, STAGES)
        out += tl.sum(query[:, None] * past, axis=0)
        if gate is not None:
            out = gated(out, gate, own.row * T + t, own.h, columns, S)
        tl.store(o + t * (S.H * S.V) + columns, out.to(o.dtype.element_ty), mask=columns < S.V)

        value = tl.load(v + t * x.stride_v + columns, mask=columns < S.V, other=0.0)
        store_token(held.open_v, i, value, columns, S.V)
        if first_v == 0:
            tl.store(held.open_g + half + i, open_gates(i, held.open_g + half, g, x, first, i))
            if own.h % (S.H // S.G) == 0:
                key = tl.load(k + t * x.stride_k + rows_k, mask=rows_k < S.K, other=0.0)
                store_token(held.open_k, half + i, key, rows_k, S.K)
        if i == S.C - 1:
            slot = close_chunk(held, k, x.stride_k, first, half, v_tile, after, whole + logs, n, M, first_v, S)
            n += 1
            logs = tl.where((slots > slot) & ((n >> slots) & 1 == 1), whole + logs, 0.0)
            if first_v == 0:
                tl.store(held.decay + n % 2 * S.H * M + slots, logs, mask=slots < M)
            tl.debug_barrier()  # later tokens of the call read the entry, and may overwrite places of v
