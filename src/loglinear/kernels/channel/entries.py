"""ENTRIES: the Fenwick array, each entry as one scan of its chunks, and the gradient of each entry as one scan of its window.

Entry e holds the lowbit(e) chunks before chunk e, and the lowbit(e) chunks from e on, its *window*, read it. A scan of a span
of n chunks makes n products, and a chunk lies in log2(N) / 2 spans on average. Programs of all entries run at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.channel.decays import load_log, store_log
from loglinear.kernels.tree.place import locate, log2_of_power, lowbit, tile_of_program
from loglinear.kernels.tree.tiles import load_entry, load_tile, store_entry


@triton.jit(do_not_specialize=["T", "N", "NG"])
def entries_kernel(x, states, table, T, N, NG, S: tl.constexpr):
    """Grid: chunks x H x tiles of [K, V], tiles fastest. float32: accumulator, logs. The last chunk ends no entry."""
    part, chunk = tile_of_program(S)
    h, first_k, first_v = part.h, part.first_k, part.first_v
    at = locate(chunk, table, T, N, NG, N, S.PACKED)
    e = chunk - at.chunk0 + 1
    if (at.length < 0) | (e * S.C >= at.length):
        return
    span = lowbit(e)
    whole = tl.arange(0, S.C) < S.C
    total = tl.zeros([S.BK, S.BV], tl.float32)
    log = tl.zeros([S.BK], tl.float32)
    for i in range(span):
        local = e - span + i
        origin = (at.start + local * S.C).to(tl.int64)
        k_tile = load_tile(x.k + h * S.K + origin * x.stride_k, x.stride_k, whole, S.C, S.K, S.BK, first_k)
        v_tile = load_tile(x.v + h * S.V + origin * x.stride_v, x.stride_v, whole, S.C, S.V, S.BV, first_v)
        decay = load_log(states.chunk_log, (at.chunk0 + local).to(tl.int64) * S.H + h, first_k, S)
        total = total * tl.exp2(decay)[:, None]
        total = tl.dot(tl.trans(k_tile), v_tile, acc=total, input_precision=S.PRECISION)
        log += decay
    site = chunk.to(tl.int64) * S.H + h
    store_entry(states.entries, site, total, True, first_k, first_v, S)
    if first_v == 0:
        store_log(states.entry_log, site, log, first_k, S)


@triton.jit(do_not_specialize=["T", "N", "NG", "L"])
def entry_grads_kernel(
    x,
    states,
    grads,  # writes ``entries`` and ``window_log``
    table,
    T,
    N,
    NG,
    L,
    S: tl.constexpr,
):
    """``Σ (λ ∘ decayed q)ᵀ dO`` over the window of every entry. Grid and types as above."""
    part, chunk = tile_of_program(S)
    h, first_k, first_v = part.h, part.first_k, part.first_v
    at = locate(chunk, table, T, N, NG, N, S.PACKED)
    e = chunk - at.chunk0 + 1
    if (at.length < 0) | (e * S.C >= at.length):
        return
    in_chunk = tl.arange(0, S.C)
    span = lowbit(e)
    end = tl.minimum(e + span, (at.length + S.C - 1) // S.C)
    scales = x.scales + h * L + tl.minimum(log2_of_power(span) + S.LOG_C + 1, L - 1)
    total = tl.zeros([S.BK, S.BV], tl.float32)
    log = tl.zeros([S.BK], tl.float32)
    for i in range(end - e):
        local = end - 1 - i
        valid = local * S.C + in_chunk < at.length
        origin = (at.start + local * S.C).to(tl.int64)
        scale = tl.load(scales + (origin + in_chunk) * x.stride_scales, mask=valid, other=0.0).to(tl.float32) * x.factor
        q_tile = load_tile(x.q + h * S.K + origin * x.stride_q, x.stride_q, valid, S.C, S.K, S.BK, first_k)
        do_tile = load_tile(x.do + h * S.V + origin * x.stride_do, x.stride_do, valid, S.C, S.V, S.BV, first_v)
        weighted = (do_tile.to(tl.float32) * scale[:, None]).to(do_tile.dtype)
        decay = load_log(states.chunk_log, (at.chunk0 + local).to(tl.int64) * S.H + h, first_k, S)
        total = total * tl.exp2(decay)[:, None]
        total = tl.dot(tl.trans(q_tile), weighted, acc=total, input_precision=S.PRECISION)
        log += decay
    site = chunk.to(tl.int64) * S.H + h
    store_entry(grads.entries, site, total, True, first_k, first_v, S)
    if first_v == 0:
        store_log(grads.window_log, site, log, first_k, S)


@triton.jit(do_not_specialize=["T", "N", "NG", "all_chunks"])
def chunk_grads_kernel(
    states,
    grads,  # reads ``entries`` and ``window_log``, writes ``chunks`` and ``beyond``
    table,
    T,
    N,
    NG,
    all_chunks,
    S: tl.constexpr,
):
    """The gradient of the state at the end of every chunk: the sum over the entries on its update path, each decayed back.

    ``beyond [tiles of V, chunks, H, K]``: the share of the gate's gradient that the keys of an entry pass to queries after its
    window. Grid and types as above.
    """
    part, chunk = tile_of_program(S)
    h, first_k, first_v = part.h, part.first_k, part.first_v
    at = locate(chunk, table, T, N, NG, N, S.PACKED)
    if at.length < 0:
        return
    site = chunk.to(tl.int64) * S.H + h
    e = chunk - at.chunk0 + 1
    own = tl.zeros([S.BK, S.BV], tl.float32)
    later = tl.zeros([S.BK, S.BV], tl.float32)
    if e * S.C < at.length:
        own = load_entry(grads.entries, site, first_k, first_v, S).to(tl.float32)
        log = load_log(grads.window_log, site, first_k, S)
        next_e = e + lowbit(e)
        while next_e * S.C < at.length:
            there = (at.chunk0 + next_e - 1).to(tl.int64) * S.H + h
            later += load_entry(grads.entries, there, first_k, first_v, S).to(tl.float32) * tl.exp2(log)[:, None]
            log += load_log(grads.window_log, there, first_k, S)
            next_e += lowbit(next_e)
        state = load_entry(states.entries, site, first_k, first_v, S).to(tl.float32)
        place = first_v // S.BV * all_chunks.to(tl.int64) * S.H + site
        store_log(grads.beyond, place, tl.sum(state * later, axis=1), first_k, S)
    store_entry(grads.chunks, site, own + later, True, first_k, first_v, S)
