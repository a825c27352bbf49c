"""SCORES: the products of queries and keys inside a chunk under their decays, and the decayed queries and keys of the tree.

The score of query t and key s is ``Σ_k q_tk k_sk exp2(decay of channel k from s to t)``. At each level of a chunk's tree, half
of its tokens are queries and the other half keys, so one tile holds both, and one product makes all scores of the level.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.channel.decays import between, in_odd_block, level_ends, load_rows, load_sums, meet
from loglinear.kernels.tree.decays import at_most_zero, strengths_of
from loglinear.kernels.tree.levels import LOG_SUB, SUB
from loglinear.kernels.tree.place import chunk_of, row_of_program
from loglinear.kernels.tree.tiles import load_tokens, store_tokens


@triton.jit
def spoilt(x, here, h, t):
    """``[..., 1]`` zero, and NaN for a token whose β is not finite. Added to its key, it spoils all that comes later."""
    return tl.expand_dims(tl.where(tl.abs(strengths_of(x, here, h, t)) < float("inf"), 0.0, float("nan")), -1)


@triton.jit
def turned(x):
    """The transpose of a matrix or of each of several."""
    return tl.trans(x) if len(x.shape) == 2 else tl.permute(x, (0, 2, 1))


@triton.jit
def to_boundary(sums, here, h, t, high, low, odd, first, level, S: tl.constexpr):
    """Decay ``[..., BK]`` between each token at ``t [...]`` and the boundary at which it meets its partners of a level.

    Not ``decays.either_way``: its absolute value makes this kernel spill 624 bytes, 3.11 ms for 0.90 (H200, Triton 3.6).
    """
    end_high, end_low = load_sums(sums, here, h, level_ends(level, t), first, S)
    log = tl.where(odd, high - end_high, end_high - high)
    if S.EXACT:
        log += tl.where(odd, low - end_low, end_low - low)
    return tl.exp2(at_most_zero(log))


@triton.jit
def store_pairs(x, made, here, h, site, SIDE: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, S: tl.constexpr):
    """The scores of the levels FROM to TO - 1 inside blocks of SIDE tokens; a larger SIDE leaves out those of SUB.

    The pairs of the lower levels lie in small blocks. Their products and masks are the smaller for it, and a warp can have a
    block to itself.
    """
    DELTA: tl.constexpr = x.beta is not None
    head = h // (S.H // S.G) * S.K
    if SIDE == SUB:
        t = tl.arange(0, S.C // SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    else:
        t = tl.arange(0, S.C)
    row, column = tl.expand_dims(t, -1), tl.expand_dims(t, -2)
    scores = tl.zeros([S.C // SIDE, SIDE, SIDE] if SIDE == SUB else [SIDE, SIDE], tl.float32)
    overlaps = scores
    for first in tl.static_range(0, S.K, S.BK):
        q_tile = load_rows(x.q + head, x.stride_q, here, t, first, S)
        q, k = q_tile.to(tl.float32), load_rows(x.k + head, x.stride_k, here, t, first, S).to(tl.float32)
        if DELTA:
            k += spoilt(x, here, h, t)
        high, low = load_sums(made.sums, here, h, t, first, S)
        for level in tl.range(FROM, TO, num_stages=1):  # not unrolled: the loads of all levels at once would spill
            odd = tl.expand_dims(in_odd_block(level, t), -1)
            decay = to_boundary(made.sums, here, h, t, high, low, odd, first, level, S)
            mixed = (tl.where(odd, q, k) * decay).to(q_tile.dtype)
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
def scores_kernel(x, made, table, T, N, NG, S: tl.constexpr):
    """Writes ``forward.Prepared``, from its sums. Grid: H x chunks, chunks fastest. float32: scores, logs."""
    at, chunk, h, _ = row_of_program(table, T, N, NG, S.H, S)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    site = chunk.to(tl.int64) * S.H + h
    store_pairs(x, made, here, h, site, SUB, 0, LOG_SUB, S)
    if S.C > SUB:
        store_pairs(x, made, here, h, site, S.C, LOG_SUB, S.LOG_C, S)
    t, head = tl.arange(0, S.C), h // (S.H // S.G)
    for first in tl.static_range(0, S.K, S.BK):
        q = load_tokens(x.q, x.stride_q, head, here, S.C, S.K, S.BK, first).to(tl.float32)
        k = load_tokens(x.k, x.stride_k, head, here, S.C, S.K, S.BK, first).to(tl.float32)
        if x.beta is not None:
            k += spoilt(x, here, h, t)
        high, low = load_sums(made.sums, here, h, t, first, S)
        end_high, end_low = load_sums(made.sums, here, h, tl.arange(0, 1) + S.C, first, S)
        early = between(high, low, end_high, end_low, S)
        store_tokens(made.q, S.H * S.K, h, here, q * tl.exp2(high), S.C, S.K, S.BK, first)
        store_tokens(made.k, S.H * S.K, h, here, k * early, S.C, S.K, S.BK, first)
        if x.beta is not None:
            store_tokens(made.starts, S.H * S.K, h, here, k * tl.exp2(high), S.C, S.K, S.BK, first)
        columns = first + tl.arange(0, S.BK)[None, :]
        tl.store(made.chunk_log + site * S.K + columns, end_high, mask=columns < S.K)
