"""SCORES: the products of queries and keys inside a chunk under their decays, and the decayed queries and keys of the tree.

The score of query t and key s is ``Σ_k q_tk k_sk exp2(decay of channel k from s to t)``. It is a product of tiles where the
pair lies in two neighbouring blocks of 16, 32, … tokens. Inside a block of 16 all pairs of one distance are taken at once, and the
decay of a distance is that of the distance before and one gate more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.channel.decays import (
    in_blocks,
    load_gates,
    load_shifted,
    meets,
    since_start,
    store_log,
    until_end,
)
from loglinear.kernels.tree.levels import LOG_SUB, SUB
from loglinear.kernels.tree.place import chunk_of, locate
from loglinear.kernels.tree.tiles import store_tokens


@triton.jit(do_not_specialize=["T", "N", "NG"])
def scores_kernel(
    x,
    made,  # see forward.Prepared
    table,
    T,
    N,
    NG,
    S: tl.constexpr,
):
    """Grid: H x rows, rows fastest. float32: scores, logs."""
    rows = tl.num_programs(0) // S.H
    row = tl.program_id(0) % rows
    h = tl.program_id(0) // rows
    at = locate(row, table, T, N, NG, N, S.PACKED)
    if at.length < 0:
        return
    here = chunk_of(at, row, S.C)
    q_head = x.q + h // (S.H // S.G) * S.K
    k_head = x.k + h // (S.H // S.G) * S.K
    all_of_them = here.valid
    in_block = tl.arange(0, S.C) % SUB
    unit = row.to(tl.int64) * S.H + h
    far = tl.zeros([S.C, S.C], tl.float32)
    near = tl.zeros([S.C, SUB], tl.float32)
    for first in tl.static_range(0, S.K, S.BK):
        q_tile = load_shifted(q_head, x.stride_q, here, 0, all_of_them, first, S)
        k_tile = load_shifted(k_head, x.stride_k, here, 0, all_of_them, first, S)
        q = q_tile.to(tl.float32)
        k = k_tile.to(tl.float32)
        gates = load_gates(x, here, h, 0, all_of_them, first, S)
        next_gates = load_gates(x, here, h, 1, all_of_them, first, S)
        for level in tl.static_range(0, S.LOG_C - LOG_SUB):
            late = (q * tl.exp2(since_start(gates, SUB << level, S))).to(q_tile.dtype)
            early = (k * tl.exp2(until_end(next_gates, SUB << level, S))).to(q_tile.dtype)
            product = tl.dot(late, tl.trans(early), input_precision=S.PRECISION)
            far += tl.where(meets(SUB << level, S.C), product, 0.0)
        decay = tl.zeros([S.C, S.BK], tl.float32)
        for distance in range(SUB):
            inside = in_block >= distance
            keys = load_shifted(k_head, x.stride_k, here, -distance, inside, first, S).to(tl.float32)
            score = tl.sum(q * keys * tl.exp2(decay), axis=1)
            near += tl.where(tl.arange(0, SUB)[None, :] == (in_block - distance)[:, None], score[:, None], 0.0)
            decay += load_gates(x, here, h, -distance, inside, first, S)
        late = q * tl.exp2(since_start(gates, S.C, S))
        early = k * tl.exp2(until_end(next_gates, S.C, S))
        store_tokens(made.q, S.H * S.K, h, here, late, S.C, S.K, S.BK, first)
        store_tokens(made.k, S.H * S.K, h, here, early, S.C, S.K, S.BK, first)
        store_log(made.chunk_log, unit, tl.sum(gates, axis=0), first, S)
    t = tl.arange(0, S.C)
    target = made.scores + unit * (S.C * S.C) + t[:, None] * S.C + t[None, :]
    tl.store(target, in_blocks(near, far, S.C).to(made.scores.dtype.element_ty))
