"""QUERY GRADIENTS: of the decayed queries, and dλ of the levels above a chunk, by the same walk as the output."""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.channel.decays import load_log, store_log
from loglinear.kernels.channel.gains import blocks_of, of_other_blocks
from loglinear.kernels.tree.levels import entry_scales
from loglinear.kernels.tree.place import chunk_of, log2_of_power, lowbit, row_of_program
from loglinear.kernels.tree.tiles import load_entry, load_tokens, store_tokens


@triton.jit(do_not_specialize=["T", "N", "NG", "L"])
def query_grads_kernel(x, states, grads, dscales, table, T, N, NG, L, S: tl.constexpr):
    """Of grads it writes ``q``, ``around``, and ``levels [tree levels, chunks, H, K]``: q·dq of a chunk by its entry's level.

    Grid: H x chunks, chunks fastest. float32: accumulators, dλ, logs.
    """
    at, chunk, h, all_chunks = row_of_program(table, T, N, NG, S.H, S)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    q = load_tokens(x.q, x.stride_q, h, here, S.C, S.K, S.BK, 0).to(tl.float32)
    total = tl.zeros([S.C, S.BK], tl.float32)
    levels = tl.arange(0, S.LEVELS)
    gradient = tl.zeros([S.C, S.LEVELS], tl.float32)
    log = tl.zeros([S.BK], tl.float32)
    e = here.n
    while e > 0:
        site = (at.chunk0 + e - 1).to(tl.int64) * S.H + h
        tree_level = log2_of_power(lowbit(e))
        scale = entry_scales(x, here, h, log2_of_power(lowbit(e)), L, S)
        product = tl.zeros([S.C, S.BK], tl.float32)
        for first_v in range(0, S.V, S.BV):
            do_tile = load_tokens(x.do, x.stride_do, h, here, S.C, S.V, S.BV, first_v)
            state = load_entry(states.entries, site, 0, first_v, S)
            product = tl.dot(do_tile, tl.trans(state), acc=product, input_precision=S.PRECISION)
        product = product * tl.exp2(log)[None, :]
        total += scale[:, None] * product
        gains = q * product
        column = tl.minimum(tree_level + S.LOG_C + 1, L - 1)
        gradient += tl.where(levels[None, :] == column, tl.sum(gains, axis=1)[:, None] * x.factor, 0.0)
        place = (tree_level * all_chunks + chunk).to(tl.int64) * S.H + h
        store_log(grads.levels, place, tl.sum(gains * scale[:, None], axis=0), 0, S)
        log += load_log(states.entry_log, site, 0, S)
        e -= lowbit(e)
    store_tokens(grads.q, S.H * S.K, h, here, total, S.C, S.K, S.BK, 0)
    pointers, inside = blocks_of(grads.around, chunk.to(tl.int64) * S.H + h, 0, S)
    tl.store(pointers, of_other_blocks(q * total, True, S), mask=inside)
    t = tl.arange(0, S.C)
    place = dscales + here.origin * (S.H * L) + h * L + (t[:, None] * (S.H * L) + levels[None, :])
    # Where levels are few, the last level inside a chunk is that of entries too; local_grads has written its part.
    kept = here.valid[:, None] & (levels < L)[None, :]
    gradient += tl.load(place, mask=kept, other=0.0).to(tl.float32)
    tl.store(place, gradient.to(dscales.dtype.element_ty), mask=kept)
