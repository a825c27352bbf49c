"""SCORES: the products of queries and keys inside a chunk under their decays, and the decayed queries and keys of the tree.

The score of query t and key s is ``Σ_k q_tk k_sk exp2(decay of channel k from s to t)``. Pairs of two blocks of 16 tokens meet
at the start of the later block. Inside a block, at each level of its tree, half of the tokens are queries and the other half
keys, so one tile holds both, and one product makes all scores of the level.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.channel.decays import (
    between,
    either_way,
    in_odd_block,
    level_ends,
    load_rows,
    load_sums,
    meet,
    settled,
    store_rows,
)
from loglinear.kernels.tree.decays import strengths_of
from loglinear.kernels.tree.levels import LOG_SUB, SUB
from loglinear.kernels.tree.place import chunk_of, locate


@triton.jit
def spoilt(x, here, h, t):
    """``[n, 1]`` zero, and NaN for a token whose β is not finite. Added to its key, it spoils all that comes later."""
    return tl.where(tl.abs(strengths_of(x, here, h, t)) < float("inf"), 0.0, float("nan"))[:, None]


@triton.jit
def load_block(x, sums, here, h, t, first, S: tl.constexpr):
    """(q, k, their running sums of the gate: value, rounding error) ``[SUB, BK]`` of the tokens at t, float32."""
    head = h // (S.H // S.G) * S.K
    q = settled(load_rows(x.q + head, x.stride_q, here, t, first, S), S)
    k = settled(load_rows(x.k + head, x.stride_k, here, t, first, S), S)
    high, low = load_sums(sums, here, h, t, first, S)
    return q, k, settled(high, S), low


@triton.jit
def earlier_keys(x, sums, here, h, t, high, low, first, S: tl.constexpr):
    """The keys ``[SUB, BK]`` at ``t`` as seen from a later token, whose sums are given, in their own dtype."""
    k = load_rows(x.k + h // (S.H // S.G) * S.K, x.stride_k, here, t, first, S)
    own_high, own_low = load_sums(sums, here, h, t, first, S)
    return (k.to(tl.float32) * between(own_high, own_low, high, low, S)).to(k.dtype)


@triton.jit
def store_pairs(x, made, site, later, earlier, scores, overlaps, C: tl.constexpr):
    """Write the pairs of two blocks, from their first places."""
    rows, columns = later + tl.arange(0, SUB)[:, None], earlier + tl.arange(0, SUB)[None, :]
    places = site * (C * C) + (rows * C + columns)
    if x.beta is not None:
        tl.store(made.overlaps + places, overlaps)
    tl.store(made.scores + places, scores.to(made.scores.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "N", "NG"])
def scores_kernel(
    x,
    made,  # see forward.Prepared; reads ``sums``
    table,
    T,
    N,
    NG,
    S: tl.constexpr,
):
    """Grid: blocks of SUB tokens of a chunk x H x chunks, blocks fastest. float32: scores, logs. A program has one warp."""
    DELTA: tl.constexpr = x.beta is not None
    BLOCKS: tl.constexpr = S.C // SUB
    low_type = x.q.dtype.element_ty
    b = tl.program_id(0) % BLOCKS
    h = tl.program_id(0) // BLOCKS % S.H
    chunk = tl.program_id(0) // (BLOCKS * S.H)
    at = locate(chunk, table, T, N, NG, N, S.PACKED)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    site = chunk.to(tl.int64) * S.H + h
    inner, edge = tl.arange(0, SUB), tl.arange(0, 1)
    t = b * SUB + inner
    none = tl.zeros([SUB, SUB], tl.float32)
    for j in tl.range(0, b, num_stages=1):
        scores = none
        overlaps = none
        for first in tl.range(0, S.K, S.BK, num_stages=1):
            q, k, high, low = load_block(x, made.sums, here, h, t, first, S)
            start_high, start_low = load_sums(made.sums, here, h, edge + (b * SUB - 1), first, S)
            decay = between(start_high, start_low, high, low, S)
            earlier = earlier_keys(x, made.sums, here, h, inner + j * SUB, start_high, start_low, first, S)
            earlier = tl.trans(earlier)
            scores = tl.dot((q * decay).to(low_type), earlier, scores, input_precision=S.PRECISION)
            if DELTA:
                overlaps = tl.dot((k * decay).to(low_type), earlier, overlaps, input_precision=S.PRECISION)
        if DELTA:
            bad = tl.trans(spoilt(x, here, h, inner + j * SUB))
            scores, overlaps = scores + bad, overlaps + bad + spoilt(x, here, h, t)
        store_pairs(x, made, site, b * SUB, j * SUB, scores, overlaps, S.C)
    for j in tl.range(b + 1, BLOCKS, num_stages=1):
        store_pairs(x, made, site, b * SUB, j * SUB, none, none, S.C)

    scores = none
    overlaps = none
    row, column = inner[:, None], inner[None, :]
    for first in tl.range(0, S.K, S.BK, num_stages=1):
        q, k, high, low = load_block(x, made.sums, here, h, t, first, S)
        end_high, end_low = load_sums(made.sums, here, h, edge + S.C, first, S)
        late, early = tl.exp2(high), between(high, low, end_high, end_low, S)
        store_rows(made.q + h * S.K, S.H * S.K, here, t, q * late, first, S)
        bad = spoilt(x, here, h, t) if DELTA else 0.0
        store_rows(made.k + h * S.K, S.H * S.K, here, t, k * early + bad, first, S)
        if DELTA:
            store_rows(made.starts + h * S.K, S.H * S.K, here, t, k * late + bad, first, S)
        for level in tl.range(0, LOG_SUB, num_stages=1):  # not unrolled: the loads of all levels at once would spill
            edge_high, edge_low = load_sums(made.sums, here, h, level_ends(level, t), first, S)
            decay = either_way(high, low, settled(edge_high, S), edge_low, S)
            mixed = (tl.where(in_odd_block(level, t)[:, None], q, k) * decay).to(low_type)
            later = meet(level, t) & (row > column)
            if DELTA:
                keys = (k * decay).to(low_type)
                product = tl.dot(keys, tl.trans(keys), input_precision=S.PRECISION)
                overlaps += tl.where(later, product, 0.0)
                product = tl.dot(mixed, tl.trans(keys), input_precision=S.PRECISION)
            else:
                product = tl.dot(mixed, tl.trans(mixed), input_precision=S.PRECISION)
            scores += tl.where(later, product, 0.0)
        scores += tl.where(row == column, tl.sum(q * k, axis=1)[:, None], 0.0)
        if DELTA:  # finite where the token is
            overlaps += tl.where(row == column, tl.sum(k * k + 0.0 * high, axis=1)[:, None], 0.0)
        if b == 0:
            columns = first + tl.arange(0, S.BK)[None, :]
            tl.store(made.chunk_log + site * S.K + columns, end_high, mask=columns < S.K)
    if DELTA:
        bad = tl.trans(spoilt(x, here, h, t))
        scores = tl.where(row >= column, scores + bad, 0.0)
        overlaps = tl.where(row >= column, overlaps + bad + spoilt(x, here, h, t), 0.0)
    store_pairs(x, made, site, b * SUB, b * SUB, scores, overlaps, S.C)
