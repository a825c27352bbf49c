"""SCORES: the products of queries and keys inside a chunk under their decays, and the decayed queries and keys of the tree.

The score of query t and key s is ``Σ_k q_tk k_sk exp2(decay of channel k from s to t)``. At each level of a chunk's tree, half
of its tokens are queries and the other half keys, so one tile holds both, and one product makes all scores of the level.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.channel.decays import (
    chunk_decays,
    in_odd_block,
    load_columns,
    load_rows,
    load_sums,
    meet,
    rows_and_columns,
    store_columns,
    to_boundary,
    tokens_in,
    turned,
)
from loglinear.kernels.tree.decays import strengths_of
from loglinear.kernels.tree.levels import LOG_SUB, SUB
from loglinear.kernels.tree.place import chunk_of, row_of_program


@triton.jit
def spoilt(x, here, h, t):
    """``[..., 1]`` zero, and NaN for a token whose β is not finite. Added to its key, it spoils all that comes later."""
    return tl.expand_dims(tl.where(tl.abs(strengths_of(x, here, h, t)) < float("inf"), 0.0, float("nan")), -1)


@triton.jit
def store_pairs(
    x, sums, made, here, h, site, plane, SIDE: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, S: tl.constexpr
):
    """The scores of the levels FROM to TO - 1 inside blocks of SIDE tokens; a larger SIDE leaves out those of SUB."""
    DELTA: tl.constexpr = x.beta is not None
    head = h // (S.H // S.G) * S.K
    t = tokens_in(SIDE, S.C)
    row, column = rows_and_columns(t)
    scores = tl.zeros([S.C // SIDE, SIDE, SIDE] if SIDE == SUB else [SIDE, SIDE], tl.float32)
    overlaps = scores
    for first in tl.static_range(0, S.K, S.BK):
        q_tile = load_rows(x.q + head, x.stride_q, here, t, first, S)
        q, k = q_tile.to(tl.float32), load_rows(x.k + head, x.stride_k, here, t, first, S).to(tl.float32)
        if DELTA:
            k += spoilt(x, here, h, t)
        high, low = load_sums(sums, here, h, t, plane, first, S)
        for level in tl.range(FROM, TO, num_stages=1):  # not unrolled: the loads of all levels at once would spill
            decay = to_boundary(sums, here, h, t, high, low, plane, first, level, S)
            mixed = (tl.where(in_odd_block(level, t), q, k) * decay).to(q_tile.dtype)
            later = meet(level, t) & (row > column)
            if DELTA:
                keys = (k * decay).to(q_tile.dtype)
                product = tl.dot(keys, turned(keys), input_precision=S.PRECISION)
                overlaps += tl.where(later, product, 0.0)
                product = tl.dot(mixed, turned(keys), input_precision=S.PRECISION)
            else:
                product = tl.dot(mixed, turned(mixed), input_precision=S.PRECISION)
            scores += tl.where(later, product, 0.0)
        if FROM == 0:
            scores += tl.where(row == column, tl.expand_dims(tl.sum(q * k, axis=-1), -1), 0.0)
            if DELTA:  # finite where the token is
                squares = tl.sum(k * k + 0.0 * high, axis=-1)
                overlaps += tl.where(row == column, tl.expand_dims(squares, -1), 0.0)
    places = site * (S.C * S.C) + (row * S.C + column)
    own = (row // SUB != column // SUB) | (FROM == 0)
    tl.store(made.scores + places, scores.to(made.scores.dtype.element_ty), mask=own)
    if DELTA:
        tl.store(made.overlaps + places, overlaps, mask=own)


@triton.jit(do_not_specialize=["T", "N", "NG"])
def scores_kernel(
    x,
    sums,
    made,  # see forward.Prepared
    plane,
    table,
    T,
    N,
    NG,
    S: tl.constexpr,
):
    """Grid: H x chunks, chunks fastest. float32: scores, logs."""
    at, chunk, h, _ = row_of_program(table, T, N, NG, S.H, S)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    site = chunk.to(tl.int64) * S.H + h
    store_pairs(x, sums, made, here, h, site, plane, SUB, 0, LOG_SUB, S)
    if S.C > SUB:
        store_pairs(x, sums, made, here, h, site, plane, S.C, LOG_SUB, S.LOG_C, S)
    head = h // (S.H // S.G) * S.K
    for first in tl.static_range(0, S.K, S.BK):
        q = load_columns(x.q + head, x.stride_q, here, first, S).to(tl.float32)
        k = load_columns(x.k + head, x.stride_k, here, first, S).to(tl.float32)
        if x.beta is not None:
            k += spoilt(x, here, h, tl.arange(0, S.C))
        high, low = load_sums(sums, here, h, tl.arange(0, S.C), plane, first, S)
        late, early, log = chunk_decays(sums, here, h, high, low, plane, first, S)
        store_columns(made.q + h * S.K, S.H * S.K, here, q * late, first, S)
        store_columns(made.k + h * S.K, S.H * S.K, here, k * early, first, S)
        if x.beta is not None:
            store_columns(made.starts + h * S.K, S.H * S.K, here, k * late, first, S)
        columns = first + tl.arange(0, S.BK)
        tl.store(made.chunk_log + site * S.K + columns[None, :], log, mask=(columns < S.K)[None, :])
