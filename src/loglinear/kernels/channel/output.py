"""OUTPUT: each chunk attends to itself by its scores and λ, then walks the entries that cover everything before it."""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.channel.decays import load_log
from loglinear.kernels.tree.levels import entry_scales, level_mask
from loglinear.kernels.tree.place import chunk_of, log2_of_power, lowbit, row_of_program
from loglinear.kernels.tree.tiles import load_entry, load_tokens, square, store_tokens


@triton.jit
def load_square(base, site, C: tl.constexpr):
    """``[C, C]`` of a site (int64) of ``[sites, C, C]``."""
    return tl.load(square(base + site * (C * C), C))


@triton.jit(do_not_specialize=["T", "N", "NG", "L"])
def output_kernel(x, states, o, table, T, N, NG, L, S: tl.constexpr):
    """Grid: tiles of V x H x chunks, chunks fastest. float32: mask, accumulator, logs."""
    BLOCKS: tl.constexpr = S.H * ((S.V + S.BV - 1) // S.BV)
    at, chunk, block, _ = row_of_program(table, T, N, NG, BLOCKS, S)
    h = block % S.H
    first_v = block // S.H * S.BV
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    q_tile = load_tokens(x.q, x.stride_q, h, here, S.C, S.K, S.BK, 0)
    v_tile = load_tokens(x.v, x.stride_v, h, here, S.C, S.V, S.BV, first_v)
    scores = load_square(states.scores, chunk.to(tl.int64) * S.H + h, S.C).to(tl.float32)
    weights = scores * level_mask(x, here, h, L, S)
    t = tl.arange(0, S.C)
    finite = tl.sum(v_tile.to(tl.float32) * 0.0, axis=1) == 0.0
    if (
        tl.sum(tl.where(finite, 0, 1), axis=0) > 0
    ):  # 0 · NaN is NaN: a token that is not finite must count for later ones alone
        weights = tl.where(finite[None, :] | (t[:, None] < t[None, :]), weights, float("nan"))
        v_tile = tl.where(finite[:, None], v_tile, 0.0).to(v_tile.dtype)
    weights = tl.where(t[:, None] >= t[None, :], weights, 0.0)
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=S.PRECISION)
    log = tl.zeros([S.BK], tl.float32)
    e = here.n
    while e > 0:
        site = (at.chunk0 + e - 1).to(tl.int64) * S.H + h
        query = (q_tile.to(tl.float32) * tl.exp2(log)[None, :]).to(q_tile.dtype)
        state = load_entry(states.entries, site, 0, first_v, S)
        acc += entry_scales(x, here, h, log2_of_power(lowbit(e)), L, S)[:, None] * tl.dot(
            query, state, input_precision=S.PRECISION
        )
        log += load_log(states.entry_log, site, 0, S)
        e -= lowbit(e)
    store_tokens(o, S.H * S.V, h, here, acc, S.C, S.V, S.BV, first_v)
