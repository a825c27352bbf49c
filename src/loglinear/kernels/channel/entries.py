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


@triton.jit(do_not_specialize=["T", "N", "NG", "L"])
def entries_kernel(x, chunk_log, entries, logs, table, T, N, NG, L, S: tl.constexpr):
    """``Σ kᵀ v`` of every entry, or, if x has do, its gradient ``Σ qᵀ (λ ∘ do)`` over its window; q and k come decayed.

    Grid: chunks x H x tiles of [K, V], tiles fastest. float32: accumulator, logs. The last chunk ends no entry.
    """
    GRADS: tl.constexpr = x.do is not None
    part, chunk = tile_of_program(S)
    h, first_k, first_v = part.h, part.first_k, part.first_v
    at = locate(chunk, table, T, N, NG, N, S.PACKED)
    e = chunk - at.chunk0 + 1
    if (at.length < 0) | (e * S.C >= at.length):
        return
    in_chunk = tl.arange(0, S.C)
    span = lowbit(e)
    count = tl.minimum(span, (at.length + S.C - 1) // S.C - e) if GRADS else span
    total = tl.zeros([S.BK, S.BV], tl.float32)
    log = tl.zeros([S.BK], tl.float32)
    for i in range(count):
        local = e + count - 1 - i if GRADS else e - span + i
        origin = (at.start + local * S.C).to(tl.int64)
        if GRADS:
            valid = local * S.C + in_chunk < at.length
            scales = x.scales + h * L + tl.minimum(log2_of_power(span) + S.LOG_C + 1, L - 1)
            scale = tl.load(scales + (origin + in_chunk) * x.stride_scales, mask=valid, other=0.0).to(tl.float32)
            left = load_tile(x.q + h * S.K + origin * x.stride_q, x.stride_q, valid, S.C, S.K, S.BK, first_k)
            right = load_tile(x.do + h * S.V + origin * x.stride_do, x.stride_do, valid, S.C, S.V, S.BV, first_v)
            right = (right.to(tl.float32) * (scale * x.factor)[:, None]).to(right.dtype)
        else:
            whole = in_chunk < S.C
            left = load_tile(x.k + h * S.K + origin * x.stride_k, x.stride_k, whole, S.C, S.K, S.BK, first_k)
            right = load_tile(x.v + h * S.V + origin * x.stride_v, x.stride_v, whole, S.C, S.V, S.BV, first_v)
        decay = load_log(chunk_log, (at.chunk0 + local).to(tl.int64) * S.H + h, first_k, S)
        total = total * tl.exp2(decay)[:, None]
        total = tl.dot(tl.trans(left), right, acc=total, input_precision=S.PRECISION)
        log += decay
    site = chunk.to(tl.int64) * S.H + h
    store_entry(entries, site, total, True, first_k, first_v, S)
    if first_v == 0:
        store_log(logs, site, log, first_k, S)


@triton.jit(do_not_specialize=["T", "N", "NG", "all_chunks"])
def chunk_grads_kernel(states, grads, table, T, N, NG, all_chunks, S: tl.constexpr):
    """The gradient of the state at the end of every chunk: the sum over the entries on its update path, each decayed back.

    Of grads it reads ``entries`` and ``window_log``, writes ``chunks`` and ``beyond [tiles of V, chunks, H, K]``: the share of
    the gate's gradient that the keys of an entry pass to queries after its window. Grid and types as above.
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
