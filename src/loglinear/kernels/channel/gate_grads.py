"""GATE GRADIENTS: dq, dk and dg, from the gradients of scores, of decayed queries and of decayed keys.

A gate lies between the keys before its token and the queries from its token on. Per channel, dg is the sum over these pairs:
pairs inside a chunk, level by level as the scores were made, queries of the chunk with keys before it, keys of the chunk with
queries after it, and pairs that skip the chunk. All are sums; no difference is taken.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.channel.decays import (
    chunk_decays,
    in_odd_block,
    load_columns,
    load_log,
    load_rows,
    load_sums,
    meet,
    rows_and_columns,
    store_columns,
    store_log,
    to_boundary,
    tokens_in,
    turned,
)
from loglinear.kernels.tree.decays import GATE_FLOOR
from loglinear.kernels.tree.levels import LOG_SUB, SUB
from loglinear.kernels.tree.place import chunk_of, locate, log2_of_power, lowbit, row_of_program
from loglinear.kernels.tree.tiles import load_part


@triton.jit(do_not_specialize=["T", "N", "NG", "all_chunks"])
def window_sums_kernel(grads, table, T, N, NG, all_chunks, S: tl.constexpr):
    """``levels`` of a chunk, in place: the gains of the queries after it in the same window. Grid: tiles of K x H x chunks."""
    TILES: tl.constexpr = (S.K + S.BK - 1) // S.BK
    first = tl.program_id(0) % TILES * S.BK
    h = tl.program_id(0) // TILES % S.H
    chunk = tl.program_id(0) // (TILES * S.H)
    at = locate(chunk, table, T, N, NG, N, S.PACKED)
    e = chunk - at.chunk0 + 1
    if (at.length < 0) | (e * S.C >= at.length):
        return
    span = lowbit(e)
    end = tl.minimum(e + span, (at.length + S.C - 1) // S.C)
    later = tl.zeros([S.BK], tl.float32)
    for i in range(end - e):
        place = (log2_of_power(span) * all_chunks + at.chunk0 + end - 1 - i).to(tl.int64) * S.H + h
        own = load_log(grads.levels, place, first, S)
        store_log(grads.levels, place, later, first, S)
        later += own


@triton.jit
def skipping(grads, at, chunk, n, h, all_chunks, tiles, first, S: tl.constexpr):
    """``[BK]`` gains of the pairs that skip a chunk, by the entry of the key: queries in its window, and queries after it."""
    total = tl.zeros([S.BK], tl.float32)
    e = n
    while e > 0:
        place = (log2_of_power(lowbit(e)) * all_chunks + chunk).to(tl.int64) * S.H + h
        total += load_log(grads.levels, place, first, S)
        site = (at.chunk0 + e - 1).to(tl.int64) * S.H + h
        for tile in range(tiles):
            total += load_log(grads.beyond, tile * all_chunks.to(tl.int64) * S.H + site, first, S)
        e -= lowbit(e)
    return total


@triton.jit
def passed(level, t):
    """``[..., SIDE, SIDE]``: whether the gate of a token (row) lies between another one (column) and the boundary at which that
    one meets its partners: the start of its block of 2^level tokens for a query, in odd blocks, the end for a key.
    """
    row, column = rows_and_columns(t)
    return ((row ^ column) >> level == 0) & ((column >= row) == ((column >> level) & 1 == 1))


@triton.jit
def both_ways(matrix, t, C: tl.constexpr):
    """The gradient of a pair for both of its tokens, at places ``t``; what is stored is zero above the diagonal."""
    row, column = rows_and_columns(t)
    stored = tl.load(matrix + (row * C + column))
    return stored + turned(stored)


@triton.jit
def pair_grads(
    query_sum, key_sum, gain, x, sums, matrix, here, h, plane, first,
    SIDE: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Add to (dq, dk, gains) ``[..., BK]`` the pairs of levels FROM to TO - 1 inside blocks of SIDE tokens."""
    DELTA: tl.constexpr = x.beta is not None
    head, t = h // (S.H // S.G) * S.K, tokens_in(SIDE, S.C)
    q_tile = load_rows(x.q + head, x.stride_q, here, t, first, S)
    q, k = q_tile.to(tl.float32), load_rows(x.k + head, x.stride_k, here, t, first, S).to(tl.float32)
    high, low = load_sums(sums, here, h, t, plane, first, S)
    pairs = both_ways(matrix, t, S.C)
    if DELTA:
        overlaps = both_ways(matrix + S.C * S.C, t, S.C)
    if FROM == 0:
        itself = tl.expand_dims(tl.load(matrix + t * (S.C + 1)).to(tl.float32), -1)
        query_sum += itself * k
        key_sum += itself * q
    for level in tl.range(FROM, TO, num_stages=1):  # not unrolled: the loads of all levels at once would spill
        odd, partners = in_odd_block(level, t), meet(level, t)
        decay = to_boundary(sums, here, h, t, high, low, plane, first, level, S)
        mixed = tl.where(odd, q, k) * decay
        own = tl.where(partners, pairs, 0.0).to(q_tile.dtype)
        gradient = tl.dot(own, mixed.to(q_tile.dtype), input_precision=S.PRECISION) * decay
        shares = gradient * tl.where(odd, q, k)
        query_sum += tl.where(odd, gradient, 0.0)
        key_sum += tl.where(odd, 0.0, gradient)
        if DELTA:
            keys = k * decay
            own = tl.where(partners, overlaps, 0.0).to(q_tile.dtype)
            gradient = tl.dot(own, keys.to(q_tile.dtype), input_precision=S.PRECISION) * decay
            shares += gradient * k
            key_sum += gradient
        between = tl.where(passed(level, t), 1.0, 0.0).to(q_tile.dtype)
        gain = tl.dot(between, shares.to(q_tile.dtype), acc=gain, input_precision=S.PRECISION)
    return query_sum, key_sum, gain


@triton.jit(do_not_specialize=["T", "N", "NG", "tiles", "part_stride"])
def gate_grads_kernel(
    x,  # the inputs of the call, not the decayed ones
    sums,
    score_grads,  # [chunks, H, PLANES, C, C], with the delta rule those of overlaps behind those of scores
    grads,  # with the delta rule q and k in the layout of the delta rule's kernels, and the gains of chunks as ``chunks``
    out,  # writes dq, dk, dg
    part_stride,  # of dq and of dk
    plane,
    table,
    T,
    N,
    NG,
    tiles,  # of V, of ``beyond``
    S: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Grid: tiles of K x H x chunks, chunks fastest. float32: accumulators, logs, gains."""
    PARTS: tl.constexpr = S.H // S.G
    DELTA: tl.constexpr = x.beta is not None
    BLOCKS: tl.constexpr = S.H * ((S.K + S.BK - 1) // S.BK)
    at, chunk, block, all_chunks = row_of_program(table, T, N, NG, BLOCKS, S)
    h = block % S.H
    first = block // S.H * S.BK
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    t = tl.arange(0, S.C)
    head = h // PARTS * S.K
    site = chunk.to(tl.int64) * S.H + h
    matrix = score_grads + site * (PLANES * S.C * S.C)
    none = tl.zeros([S.C // SUB, SUB, S.BK], tl.float32)
    query_sum, key_sum, gain = pair_grads(none, none, none, x, sums, matrix, here, h, plane, first, SUB, 0, LOG_SUB, S)
    query_sum, key_sum = tl.reshape(query_sum, [S.C, S.BK]), tl.reshape(key_sum, [S.C, S.BK])
    gain = tl.reshape(gain, [S.C, S.BK])
    if S.C > SUB:
        query_sum, key_sum, gain = pair_grads(
            query_sum, key_sum, gain, x, sums, matrix, here, h, plane, first, S.C, LOG_SUB, S.LOG_C, S
        )

    # Pairs of two chunks: a query meets its keys at the start of the chunk, a key its queries at the end.
    q = load_columns(x.q + head, x.stride_q, here, first, S).to(tl.float32)
    k = load_columns(x.k + head, x.stride_k, here, first, S).to(tl.float32)
    high, low = load_sums(sums, here, h, t, plane, first, S)
    late, early, _ = chunk_decays(sums, here, h, high, low, plane, first, S)
    from_here = tl.where(t[None, :] >= t[:, None], 1.0, 0.0)
    if DELTA:
        SIZE: tl.constexpr = S.C * S.K
        own_query = load_part(grads.q + site * SIZE, S.K, 0, first, S.C, S.K, S.C, S.BK).to(tl.float32) * late
        own_start = load_part(grads.k + 2 * site * SIZE, S.K, 0, first, S.C, S.K, S.C, S.BK).to(tl.float32) * late
        own_key = load_part(grads.k + (2 * site + 1) * SIZE, S.K, 0, first, S.C, S.K, S.C, S.BK).to(tl.float32) * early
        seen = own_query * q + own_start * k
        key_sum += own_start
        gain += load_log(grads.chunks, site, first, S)[None, :]
    else:
        own_query = load_columns(grads.q + h * S.K, S.H * S.K, here, first, S).to(tl.float32) * late
        own_key = load_columns(grads.k + h * S.K, S.H * S.K, here, first, S).to(tl.float32) * early
        seen = own_query * q
        gain += skipping(grads, at, chunk, here.n, h, all_chunks, tiles, first, S)[None, :]
    gain = tl.dot(from_here, seen, acc=gain, input_precision=S.PRECISION)
    gain = tl.dot(1.0 - from_here, own_key * k, acc=gain, input_precision=S.PRECISION)

    part = (h % PARTS).to(tl.int64) * part_stride + head
    store_columns(out.dq + part, out.stride_dq, here, query_sum + own_query, first, S)
    store_columns(out.dk + part, out.stride_dk, here, key_sum + own_key, first, S)
    raw = load_columns(x.g + h * S.K, x.stride_g, here, first, S).to(tl.float32)
    store_columns(out.dg + h * S.K, out.stride_dg, here, tl.where(raw > GATE_FLOOR, gain, 0.0), first, S)
