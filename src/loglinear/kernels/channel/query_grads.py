"""QUERY GRADIENTS: of the scores inside a chunk, of the decayed queries, by the same walk as the output, and dλ."""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.channel.decays import load_log, store_log
from loglinear.kernels.channel.gains import blocks_of, of_other_blocks
from loglinear.kernels.tree.levels import entry_scales, level_mask
from loglinear.kernels.tree.place import bit_length, chunk_of, log2_of_power, lowbit, row_of_program
from loglinear.kernels.tree.tiles import load_entry, load_square, load_tokens, square, store_tokens


@triton.jit
def local_grads(x, scores, score_grads, here, site, h, L, S: tl.constexpr):
    """dλ ``[C, LEVELS]`` of the pairs of a chunk, but for the factor of o; stores the gradient of their scores."""
    t, levels = tl.arange(0, S.C), tl.arange(0, S.LEVELS)
    grads = tl.zeros([S.C, S.C], tl.float32)
    for first_v in tl.static_range(0, S.V, S.BV):
        v_tile = load_tokens(x.v, x.stride_v, h, here, S.C, S.V, S.BV, first_v)
        do_tile = load_tokens(x.do, x.stride_do, h, here, S.C, S.V, S.BV, first_v)
        grads = tl.dot(do_tile, tl.trans(v_tile), acc=grads, input_precision=S.PRECISION)
    grads = tl.where(t[:, None] >= t[None, :], grads, 0.0)
    masked = grads * level_mask(x, here, h, L, S)
    tl.store(square(score_grads + site * (S.C * S.C), S.C), masked.to(score_grads.dtype.element_ty))
    pairs = grads * load_square(scores, site, S.C).to(tl.float32)
    apart = bit_length(t[:, None] ^ t[None, :])
    gradient = tl.zeros([S.C, S.LEVELS], tl.float32)
    for level in tl.static_range(0, S.LOG_C + 1):
        part = tl.sum(tl.where(apart == level, pairs, 0.0), axis=1)
        gradient += tl.where(levels[None, :] == tl.minimum(level, L - 1), part[:, None], 0.0)
    return gradient


@triton.jit(do_not_specialize=["T", "N", "NG", "L"])
def query_grads_kernel(x, scores, entries, logs, score_grads, grads, dscales, table, T, N, NG, L, S: tl.constexpr):
    """Of grads it writes ``q``, ``around``, and ``levels [tree levels, chunks, H, K]``: q·dq of a chunk by its entry's level.

    Grid: H x chunks, chunks fastest. float32: accumulators, mask, dλ, logs; score_grads ``[chunks, H, C, C]`` until stored.
    """
    at, chunk, h, all_chunks = row_of_program(table, T, N, NG, S.H, S)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    own = chunk.to(tl.int64) * S.H + h
    gradient = local_grads(x, scores, score_grads, here, own, h, L, S)
    levels = tl.arange(0, S.LEVELS)
    q = load_tokens(x.q, x.stride_q, h, here, S.C, S.K, S.BK, 0).to(tl.float32)
    total = tl.zeros([S.C, S.BK], tl.float32)
    log = tl.zeros([S.BK], tl.float32)
    e = here.n
    while e > 0:
        site = (at.chunk0 + e - 1).to(tl.int64) * S.H + h
        tree_level = log2_of_power(lowbit(e))
        scale = entry_scales(x, here, h, tree_level, L, S)
        product = tl.zeros([S.C, S.BK], tl.float32)
        for first_v in range(0, S.V, S.BV):
            do_tile = load_tokens(x.do, x.stride_do, h, here, S.C, S.V, S.BV, first_v)
            state = load_entry(entries, site, 0, first_v, S)
            product = tl.dot(do_tile, tl.trans(state), acc=product, input_precision=S.PRECISION)
        product = product * tl.exp2(log)[None, :]
        total += scale[:, None] * product
        gains = q * product
        column = tl.minimum(tree_level + S.LOG_C + 1, L - 1)
        gradient += tl.where(levels[None, :] == column, tl.sum(gains, axis=1)[:, None], 0.0)
        place = (tree_level * all_chunks + chunk).to(tl.int64) * S.H + h
        store_log(grads.levels, place, tl.sum(gains * scale[:, None], axis=0), 0, S)
        log += load_log(logs, site, 0, S)
        e -= lowbit(e)
    store_tokens(grads.q, S.H * S.K, h, here, total, S.C, S.K, S.BK, 0)
    pointers, inside = blocks_of(grads.around, own, 0, S)
    tl.store(pointers, of_other_blocks(q * total, True, S), mask=inside)
    place = dscales + here.origin * (S.H * L) + h * L + (tl.arange(0, S.C)[:, None] * (S.H * L) + levels[None, :])
    kept = here.valid[:, None] & (levels < L)[None, :]
    tl.store(place, (gradient * x.factor).to(dscales.dtype.element_ty), mask=kept)
