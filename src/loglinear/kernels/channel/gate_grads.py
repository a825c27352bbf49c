"""GATE GRADIENTS: dq, dk and dg, from the gradients of scores, of decayed queries and of decayed keys.

A gate lies between the keys before its token and the queries from its token on. Per channel, dg is the sum over these pairs:
pairs inside a chunk, block by block as the scores were made, queries of the chunk with keys before it, keys of the chunk with
queries after it, and pairs that skip the chunk. Only the pairs within 16 tokens take a difference, of two sums of the same products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.channel.decays import (
    load_gates,
    load_log,
    load_shifted,
    meets,
    since_start,
    store_log,
    until_end,
)
from loglinear.kernels.channel.output import load_square
from loglinear.kernels.tree.decays import GATE_FLOOR
from loglinear.kernels.tree.levels import LOG_SUB, SUB
from loglinear.kernels.tree.place import chunk_of, locate, log2_of_power, lowbit


@triton.jit(do_not_specialize=["T", "N", "NG", "all_rows"])
def window_sums_kernel(grads, table, T, N, NG, all_rows, S: tl.constexpr):
    """``levels`` of a chunk, in place: the gains of the queries after it in the same window. Grid: tiles of K x H x rows."""
    TILES: tl.constexpr = (S.K + S.BK - 1) // S.BK
    first = tl.program_id(0) % TILES * S.BK
    h = tl.program_id(0) // TILES % S.H
    row = tl.program_id(0) // (TILES * S.H)
    at = locate(row, table, T, N, NG, N, S.PACKED)
    e = row - at.row0 + 1
    if (at.length < 0) | (e * S.C >= at.length):
        return
    span = lowbit(e)
    end = tl.minimum(e + span, (at.length + S.C - 1) // S.C)
    later = tl.zeros([S.BK], tl.float32)
    for i in range(end - e):
        place = (log2_of_power(span) * all_rows + at.row0 + end - 1 - i).to(tl.int64) * S.H + h
        own = load_log(grads.levels, place, first, S)
        store_log(grads.levels, place, later, first, S)
        later += own


@triton.jit
def skipping(grads, at, row, n, h, all_rows, tiles, first, S: tl.constexpr):
    """``[BK]`` gains of the pairs that skip a chunk, by the entry of the key: queries in its window, and queries after it."""
    total = tl.zeros([S.BK], tl.float32)
    e = n
    while e > 0:
        place = (log2_of_power(lowbit(e)) * all_rows + row).to(tl.int64) * S.H + h
        total += load_log(grads.levels, place, first, S)
        unit = (at.row0 + e - 1).to(tl.int64) * S.H + h
        for tile in range(tiles):
            total += load_log(grads.beyond, tile * all_rows.to(tl.int64) * S.H + unit, first, S)
        e -= lowbit(e)
    return total


@triton.jit
def from_end(x, BLOCK: tl.constexpr, S: tl.constexpr):
    """``[C, BK]`` sums of a token and those after it in its block."""
    blocks = tl.reshape(x, [S.C // BLOCK, BLOCK, S.BK])
    return tl.reshape(tl.cumsum(blocks, axis=1, reverse=True), [S.C, S.BK])


@triton.jit
def before(x, BLOCK: tl.constexpr, S: tl.constexpr):
    """``[C, BK]`` sums of the tokens before a token in its block."""
    blocks = tl.reshape(x, [S.C // BLOCK, BLOCK, S.BK])
    return tl.reshape(tl.cumsum(blocks, axis=1) - blocks, [S.C, S.BK])


@triton.jit(do_not_specialize=["T", "N", "NG", "all_rows", "all_tokens", "tiles"])
def gate_grads_kernel(
    x,  # the inputs of the call, not the decayed ones
    score_grads,
    grads,
    dq,  # [H/G, B*T, G, K], as dk: float32 partial sums unless the first size is 1
    dk,
    dg,
    table,
    T,
    N,
    NG,
    all_rows,
    all_tokens,
    tiles,  # of V, of ``beyond``
    S: tl.constexpr,
):
    """Grid: tiles of K x H x rows, rows fastest. float32 throughout, but for operands of products."""
    PARTS: tl.constexpr = S.H // S.G
    rows = all_rows
    row = tl.program_id(0) % rows
    h = tl.program_id(0) // rows % S.H
    first = tl.program_id(0) // (rows * S.H) * S.BK
    at = locate(row, table, T, N, NG, N, S.PACKED)
    if at.length < 0:
        return
    here = chunk_of(at, row, S.C)
    valid = here.valid
    t = tl.arange(0, S.C)
    in_block = t % SUB
    q_head = x.q + h // PARTS * S.K
    k_head = x.k + h // PARTS * S.K
    q_tile = load_shifted(q_head, x.stride_q, here, 0, valid, first, S)
    q = q_tile.to(tl.float32)
    k = load_shifted(k_head, x.stride_k, here, 0, valid, first, S).to(tl.float32)
    gates = load_gates(x, here, h, 0, valid, first, S)
    next_gates = load_gates(x, here, h, 1, valid, first, S)

    # Pairs of two chunks.
    late, early = tl.exp2(since_start(gates, S.C, S)), tl.exp2(until_end(next_gates, S.C, S))
    dlate = load_shifted(grads.q + h * S.K, S.H * S.K, here, 0, valid, first, S).to(tl.float32)
    dearly = load_shifted(grads.k + h * S.K, S.H * S.K, here, 0, valid, first, S).to(tl.float32)
    query_sum = dlate * late
    key_sum = dearly * early
    gain = from_end(query_sum * q, S.C, S) + before(key_sum * k, S.C, S)
    gain += skipping(grads, at, row, here.n, h, all_rows, tiles, first, S)[None, :]

    # Pairs of two blocks.
    unit = row.to(tl.int64) * S.H + h
    dscores = load_square(score_grads, unit, S.C)
    for level in tl.static_range(0, S.LOG_C - LOG_SUB):
        late, early = tl.exp2(since_start(gates, SUB << level, S)), tl.exp2(until_end(next_gates, SUB << level, S))
        part = tl.where(meets(SUB << level, S.C), dscores, 0.0).to(q_tile.dtype)
        dlate = tl.dot(part, (k * early).to(q_tile.dtype), input_precision=S.PRECISION) * late
        dearly = tl.dot(tl.trans(part), (q * late).to(q_tile.dtype), input_precision=S.PRECISION) * early
        query_sum += dlate
        key_sum += dearly
        gain += from_end(dlate * q, SUB << level, S) + before(dearly * k, SUB << level, S)

    # Pairs of one block, by their distance; a token and itself have no gate between them.
    own_query = tl.zeros([S.C, S.BK], tl.float32)
    own_key = tl.zeros([S.C, S.BK], tl.float32)
    to_query = tl.zeros([S.C, S.BK], tl.float32)
    to_key = tl.zeros([S.C, S.BK], tl.float32)
    square = score_grads + unit * (S.C * S.C)
    for distance in range(1, SUB):
        inside = in_block >= distance
        to_query += load_gates(x, here, h, 1 - distance, inside, first, S)
        weight = tl.load(square + t * S.C + (t - distance), mask=inside, other=0.0).to(tl.float32)
        keys = load_shifted(k_head, x.stride_k, here, -distance, inside, first, S).to(tl.float32)
        own_query += weight[:, None] * keys * tl.exp2(to_query)
        inside = in_block + distance < SUB
        to_key += load_gates(x, here, h, distance, inside, first, S)
        weight = tl.load(square + (t + distance) * S.C + t, mask=inside, other=0.0).to(tl.float32)
        queries = load_shifted(q_head, x.stride_q, here, distance, inside, first, S).to(tl.float32)
        own_key += weight[:, None] * queries * tl.exp2(to_key)
    gain += from_end(own_query * q - own_key * k, SUB, S)
    itself = tl.load(square + t * S.C + t).to(tl.float32)
    query_sum += own_query + itself[:, None] * k
    key_sum += own_key + itself[:, None] * q

    columns = first + tl.arange(0, S.BK)
    kept = valid[:, None] & (columns < S.K)[None, :]
    part = (h % PARTS).to(tl.int64) * all_tokens + here.origin
    place = part * (S.G * S.K) + h // PARTS * S.K + (t[:, None] * (S.G * S.K) + columns[None, :])
    tl.store(dq + place, query_sum.to(dq.dtype.element_ty), mask=kept)
    tl.store(dk + place, key_sum.to(dk.dtype.element_ty), mask=kept)
    raw = load_shifted(x.g + h * S.K, x.stride_g, here, 0, valid, first, S).to(tl.float32)
    gain = tl.where(raw > GATE_FLOOR, gain, 0.0)
    target = dg + here.origin * (S.H * S.K) + h * S.K + (t[:, None] * (S.H * S.K) + columns[None, :])
    tl.store(target, gain.to(dg.dtype.element_ty), mask=kept)
