"""LOCAL GRADIENTS: the gradient of the scores inside a chunk, and dλ of the levels inside a chunk.

One pass serves all heads of a program: the gradient of the scores is summed over them (``dS``), and the query and key
sides multiply that sum by K and by Q once. The diagonal is kept out of the products: in the gate's gradient it would
cancel and leave its rounding error behind.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.levels import LOG_SUB, SUB, assemble_mask, chunk_scales, local_decays, local_levels
from loglinear.kernels.tree.place import chunk_of, row_of_program
from loglinear.kernels.tree.tiles import load_tokens, square


@triton.jit
def level_gradients(pairs, scales, decays, diagonal, factor, L, S: tl.constexpr):
    """(dλ ``[C, LEVELS]`` of levels 0 .. log2(C), the row's q·dq without the diagonal ``[C]``).

    ``pairs [C, C/SUB, SUB]`` is scores ∘ dP with a zero diagonal, ``diagonal [C]`` is that diagonal.
    """
    near, far = scales
    near_decay, far_decay, column = decays
    own, other = local_levels(S.C)
    is_own = (tl.arange(0, S.C) // SUB)[:, None] == tl.arange(0, S.C // SUB)[None, :]
    near_pairs = tl.sum(tl.where(is_own[:, :, None], pairs, 0.0), axis=1) * near_decay
    far_pairs = tl.sum(pairs * column[None, :, :], axis=2) * far_decay
    below = tl.arange(0, SUB)[None, :] < (tl.arange(0, S.C) % SUB)[:, None]
    before = tl.arange(0, S.C // SUB)[None, :] < (tl.arange(0, S.C) // SUB)[:, None]
    near_pairs = tl.where(below, near_pairs, 0.0)
    far_pairs = tl.where(before, far_pairs, 0.0)
    columns = tl.arange(0, S.LEVELS)[None, :]
    gradient = tl.where(columns == 0, diagonal[:, None], 0.0)
    for level in tl.static_range(1, S.LOG_C + 1):
        if level <= LOG_SUB:
            row = tl.sum(tl.where(own == level, near_pairs, 0.0), axis=1)
        else:
            row = tl.sum(tl.where(other == level, far_pairs, 0.0), axis=1)
        gradient += tl.where(columns == tl.minimum(level, L - 1), row[:, None], 0.0)
    own_part = tl.sum(near * near_pairs, axis=1) + tl.sum(far * far_pairs, axis=1)
    return gradient * factor, own_part


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "L"])
def local_grads_kernel(
    x, L, states, score_grads, dscales, gains, table, T, N, NG, all_tokens, sums_stride, S: tl.constexpr
):
    """dS ``[chunks, H / HEADS, C, C]`` and dλ. Grid: H/HEADS x chunks, chunks fastest. float32: all of it until it is stored.

    The gains ``rows`` and ``columns`` are sums of the same float32 products, so that their difference keeps its digits.
    """
    NB: tl.constexpr = S.C // SUB
    at, chunk, block, _ = row_of_program(table, T, N, NG, S.H // S.HEADS, S)
    if at.length < 0:
        return
    here = chunk_of(at, chunk, S.C)
    in_chunk = tl.arange(0, S.C)
    group_head = block * S.HEADS // (S.H // S.G)
    q_tile = load_tokens(x.q, x.stride_q, group_head, here, S.C, S.K, S.BK, 0)
    k_tile = load_tokens(x.k, x.stride_k, group_head, here, S.C, S.K, S.BK, 0)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=S.PRECISION)
    is_diagonal = in_chunk[:, None] == in_chunk[None, :]
    own_score = tl.sum(tl.where(is_diagonal, scores, 0.0), axis=1)
    scores = tl.reshape(tl.where(is_diagonal, 0.0, scores), [S.C, NB, SUB])
    grads = tl.zeros([S.C, NB, SUB], tl.float32)
    # λ of the next head is on its way while this one is computed.
    next_near, next_far = chunk_scales(x, here, block * S.HEADS, L, S)
    for i in range(S.HEADS):
        h = block * S.HEADS + i
        head_sums = states.sums + h.to(tl.int64) * sums_stride + here.origin
        near, far = next_near, next_far
        next_near, next_far = chunk_scales(x, here, tl.minimum(h + 1, block * S.HEADS + S.HEADS - 1), L, S)
        near_decay, far_decay, column = local_decays(head_sums, here.size, all_tokens, S)
        dp = tl.zeros([S.C, S.C], tl.float32)
        for first_v in tl.static_range(0, S.V, S.BV):
            v_tile = load_tokens(x.v, x.stride_v, h, here, S.C, S.V, S.BV, first_v)
            do_tile = load_tokens(x.do, x.stride_do, h, here, S.C, S.V, S.BV, first_v)
            dp = tl.dot(do_tile, tl.trans(v_tile), acc=dp, input_precision=S.PRECISION)
        own_dp = tl.sum(tl.where(is_diagonal, dp, 0.0), axis=1)
        dp = tl.reshape(dp, [S.C, NB, SUB])
        mask = assemble_mask(near * near_decay, far * far_decay, column, S.C)
        grads += dp * mask
        pairs = scores * dp
        decays = (near_decay, far_decay, column)
        gradient, row_part = level_gradients(pairs, (near, far), decays, own_score * own_dp, x.factor, L, S)
        levels = tl.arange(0, S.LEVELS)
        place = dscales + here.origin * (S.H * L) + h * L + (in_chunk[:, None] * (S.H * L) + levels[None, :])
        written = here.valid[:, None] & (levels < tl.minimum(L, S.LOG_C + 1))[None, :]
        tl.store(place, gradient.to(dscales.dtype.element_ty), mask=written)
        if x.g is not None:
            tokens = h.to(tl.int64) * all_tokens + here.origin + in_chunk
            tl.store(gains.rows + tokens, row_part, mask=here.valid)
            tl.store(gains.columns + tokens, tl.reshape(tl.sum(pairs * mask, axis=0), [S.C]), mask=here.valid)
    target = score_grads + (chunk.to(tl.int64) * (S.H // S.HEADS) + block) * (S.C * S.C)
    tl.store(square(target, S.C), tl.reshape(grads, [S.C, S.C]).to(score_grads.dtype.element_ty))
