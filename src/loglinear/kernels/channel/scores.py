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
    load_sums,
    meet,
    store_columns,
    to_boundary,
)
from loglinear.kernels.tree.place import chunk_of, row_of_program
from loglinear.kernels.tree.tiles import square


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
    head = h // (S.H // S.G) * S.K
    site = chunk.to(tl.int64) * S.H + h
    t = tl.arange(0, S.C)
    scores = tl.zeros([S.C, S.C], tl.float32)
    DELTA: tl.constexpr = x.beta is not None
    if DELTA:
        overlaps = tl.zeros([S.C, S.C], tl.float32)
        # A token whose β is not finite spoils its key, and with it all that comes later, and nothing before.
        strength = tl.load(x.beta + h + (here.origin + t) * x.stride_beta, mask=here.valid, other=0.0).to(tl.float32)
        sound = tl.where(tl.abs(strength) < float("inf"), 0.0, float("nan"))[:, None]
    for first in tl.static_range(0, S.K, S.BK):
        q_tile = load_columns(x.q + head, x.stride_q, here, first, S)
        k_tile = load_columns(x.k + head, x.stride_k, here, first, S)
        q, k = q_tile.to(tl.float32), k_tile.to(tl.float32)
        if DELTA:
            k += sound
        high, low = load_sums(sums, here, h, t, plane, first, S)
        for level in tl.range(0, S.LOG_C, num_stages=1):  # not unrolled: the loads of all levels at once would spill
            decay = to_boundary(sums, here, h, high, low, plane, first, level, S)
            mixed = (tl.where(in_odd_block(level, S.C), q, k) * decay).to(q_tile.dtype)
            later = meet(level, S.C) & (t[:, None] > t[None, :])
            if DELTA:
                keys = (k * decay).to(q_tile.dtype)
                product = tl.dot(keys, tl.trans(keys), input_precision=S.PRECISION)
                overlaps += tl.where(later, product, 0.0)
                product = tl.dot(mixed, tl.trans(keys), input_precision=S.PRECISION)
            else:
                product = tl.dot(mixed, tl.trans(mixed), input_precision=S.PRECISION)
            scores += tl.where(later, product, 0.0)
        scores += tl.where(t[:, None] == t[None, :], tl.sum(q * k, axis=1)[:, None], 0.0)
        late, early, log = chunk_decays(sums, here, h, high, low, plane, first, S)
        store_columns(made.q + h * S.K, S.H * S.K, here, q * late, first, S)
        store_columns(made.k + h * S.K, S.H * S.K, here, k * early, first, S)
        if DELTA:
            store_columns(made.starts + h * S.K, S.H * S.K, here, k * late, first, S)
            squares = tl.sum(k * k + 0.0 * high, axis=1)  # finite where the token is
            overlaps += tl.where(t[:, None] == t[None, :], squares[:, None], 0.0)
        columns = first + tl.arange(0, S.BK)
        tl.store(made.chunk_log + site * S.K + columns[None, :], log, mask=(columns < S.K)[None, :])
    if DELTA:
        tl.store(square(made.overlaps + site * (S.C * S.C), S.C), overlaps)
    tl.store(square(made.scores + site * (S.C * S.C), S.C), scores.to(made.scores.dtype.element_ty))
