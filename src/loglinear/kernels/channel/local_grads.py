"""LOCAL GRADIENTS: the gradient of the scores inside a chunk, and dλ of the levels inside a chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.channel.output import load_square
from loglinear.kernels.tree.levels import level_mask
from loglinear.kernels.tree.place import bit_length, chunk_of, row_of_program
from loglinear.kernels.tree.tiles import load_tokens, square


@triton.jit(do_not_specialize=["T", "N", "NG", "L"])
def local_grads_kernel(x, states, score_grads, dscales, table, T, N, NG, L, S: tl.constexpr):
    """Grid: H x chunks, chunks fastest.

    float32: scores, mask, dλ, and the gradient until it is stored ``[chunks, H, C, C]``.
    """
    at, chunk, h, _ = row_of_program(table, T, N, NG, S.H, S)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    t = tl.arange(0, S.C)
    site = chunk.to(tl.int64) * S.H + h
    grads = tl.zeros([S.C, S.C], tl.float32)
    for first_v in tl.static_range(0, S.V, S.BV):
        v_tile = load_tokens(x.v, x.stride_v, h, here, S.C, S.V, S.BV, first_v)
        do_tile = load_tokens(x.do, x.stride_do, h, here, S.C, S.V, S.BV, first_v)
        grads = tl.dot(do_tile, tl.trans(v_tile), acc=grads, input_precision=S.PRECISION)
    grads = tl.where(t[:, None] >= t[None, :], grads, 0.0)
    pairs = grads * load_square(states.scores, site, S.C).to(tl.float32)
    apart = bit_length(t[:, None] ^ t[None, :])
    levels = tl.arange(0, S.LEVELS)
    gradient = tl.zeros([S.C, S.LEVELS], tl.float32)
    for level in tl.static_range(0, S.LOG_C + 1):
        part = tl.sum(tl.where(apart == level, pairs, 0.0), axis=1)
        gradient += tl.where(levels[None, :] == tl.minimum(level, L - 1), part[:, None], 0.0)
    place = dscales + here.origin * (S.H * L) + h * L + (t[:, None] * (S.H * L) + levels[None, :])
    written = here.valid[:, None] & (levels < L)[None, :]
    tl.store(place, (gradient * x.factor).to(dscales.dtype.element_ty), mask=written)
    tl.store(
        square(score_grads + site * (S.C * S.C), S.C),
        (grads * level_mask(x, here, h, L, S)).to(score_grads.dtype.element_ty),
    )
