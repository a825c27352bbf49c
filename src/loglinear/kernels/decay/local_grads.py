"""LOCAL GRADIENTS: the gradient of the scores inside a chunk, and dλ of the levels inside a chunk.

One pass serves all heads of a program: the gradient of the scores is summed over them (``dS``), and the query and key
sides multiply that sum by K and by Q once. The diagonal is kept out of the products: in the gate's gradient it would
cancel and leave its rounding error behind.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.levels import LOG_SUB, SUB, assemble_mask, local_decays, local_levels, local_scales
from loglinear.kernels.tree.place import locate
from loglinear.kernels.tree.tiles import load_tile


@triton.jit
def level_gradients(pairs, near, far, near_decay, far_decay, column, diagonal, factor, L, C: tl.constexpr,
                    LEVELS: tl.constexpr, LOG_C: tl.constexpr):  # fmt: skip
    """(dλ ``[C, LEVELS]`` of levels 0 .. log2(C), the row's q·dq without the diagonal ``[C]``).

    ``pairs [C, C/SUB, SUB]`` is scores ∘ dP with a zero diagonal, ``diagonal [C]`` is that diagonal.
    """
    own, other = local_levels(C)
    is_own = (tl.arange(0, C) // SUB)[:, None] == tl.arange(0, C // SUB)[None, :]
    near_pairs = tl.sum(tl.where(is_own[:, :, None], pairs, 0.0), axis=1) * near_decay
    far_pairs = tl.sum(pairs * column[None, :, :], axis=2) * far_decay
    below = tl.arange(0, SUB)[None, :] < (tl.arange(0, C) % SUB)[:, None]
    before = tl.arange(0, C // SUB)[None, :] < (tl.arange(0, C) // SUB)[:, None]
    near_pairs = tl.where(below, near_pairs, 0.0)
    far_pairs = tl.where(before, far_pairs, 0.0)
    columns = tl.arange(0, LEVELS)[None, :]
    gradient = tl.where(columns == 0, diagonal[:, None], 0.0)
    for level in tl.static_range(1, LOG_C + 1):
        if level <= LOG_SUB:
            row = tl.sum(tl.where(own == level, near_pairs, 0.0), axis=1)
        else:
            row = tl.sum(tl.where(other == level, far_pairs, 0.0), axis=1)
        gradient += tl.where(columns == tl.minimum(level, L - 1), row[:, None], 0.0)
    own_part = tl.sum(near * near_pairs, axis=1) + tl.sum(far * far_pairs, axis=1)
    return gradient * factor, own_part


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "L"])
def local_grads_kernel(
    q,
    k,
    v,
    do,
    level_scales,
    sums,
    score_grads,  # [rows, H / HEADS, C, C]
    dlevel_scales,
    row_gain,  # [H, B*T] q·dq inside the chunk, without the diagonal
    column_gain,  # [H, B*T] k·dk likewise: sums of the same float32 products, so that their difference keeps its digits
    row_sequence,
    sequences,
    T,
    N,
    NG,
    all_tokens,
    sums_stride,
    stride_q,
    stride_k,
    stride_v,
    stride_do,
    stride_s,
    factor,
    L,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LOG_C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: H/HEADS x rows, rows fastest. float32: scores, mask, accumulators, dS until it is stored."""
    NB: tl.constexpr = C // SUB
    rows = tl.num_programs(0) // (H // HEADS)
    pid = tl.program_id(0)
    row = pid % rows
    block = pid // rows
    start, length, row0, _, _, _ = locate(row, row_sequence, sequences, T, N, NG, N, PACKED)
    if length < 0:
        return
    local = row - row0
    in_chunk = tl.arange(0, C)
    size = length - local * C
    valid = in_chunk < size
    origin = (start + local * C).to(tl.int64)
    group_head = block * HEADS // (H // G)
    q_tile = load_tile(q + origin * stride_q + group_head * K, stride_q, valid, C, K, BK, 0)
    k_tile = load_tile(k + origin * stride_k + group_head * K, stride_k, valid, C, K, BK, 0)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    is_diagonal = in_chunk[:, None] == in_chunk[None, :]
    own_score = tl.sum(tl.where(is_diagonal, scores, 0.0), axis=1)
    scores = tl.reshape(tl.where(is_diagonal, 0.0, scores), [C, NB, SUB])
    dscores = tl.zeros([C, NB, SUB], tl.float32)
    # λ of the next head is on its way while this one is computed.
    next_near, next_far = local_scales(
        level_scales + origin * stride_s + block * HEADS * L, valid, stride_s, factor, L, C
    )
    for i in range(HEADS):
        h = block * HEADS + i
        head_sums = sums + h.to(tl.int64) * sums_stride + origin
        near, far = next_near, next_far
        ahead = tl.minimum(h + 1, block * HEADS + HEADS - 1)
        next_near, next_far = local_scales(level_scales + origin * stride_s + ahead * L, valid, stride_s, factor, L, C)
        near_decay, far_decay, column = local_decays(head_sums, size, all_tokens, C, EXACT)
        dp = tl.zeros([C, C], tl.float32)
        for first_v in tl.static_range(0, V, BV):
            v_tile = load_tile(v + origin * stride_v + h * V, stride_v, valid, C, V, BV, first_v)
            do_tile = load_tile(do + origin * stride_do + h * V, stride_do, valid, C, V, BV, first_v)
            dp = tl.dot(do_tile, tl.trans(v_tile), acc=dp, input_precision=PRECISION)
        own_dp = tl.sum(tl.where(is_diagonal, dp, 0.0), axis=1)
        dp = tl.reshape(dp, [C, NB, SUB])
        mask = assemble_mask(near * near_decay, far * far_decay, column, C)
        dscores += dp * mask
        pairs = scores * dp
        gradient, row_part = level_gradients(pairs, near, far, near_decay, far_decay, column,
                                             own_score * own_dp, factor, L, C, LEVELS, LOG_C)  # fmt: skip
        columns = tl.arange(0, LEVELS)
        place = dlevel_scales + origin * (H * L) + h * L + (in_chunk[:, None] * (H * L) + columns[None, :])
        written = valid[:, None] & (columns < tl.minimum(L, LOG_C + 1))[None, :]
        tl.store(place, gradient.to(dlevel_scales.dtype.element_ty), mask=written)
        if HAS_GATE:
            gains = h.to(tl.int64) * all_tokens + origin + in_chunk
            tl.store(row_gain + gains, row_part, mask=valid)
            tl.store(column_gain + gains, tl.reshape(tl.sum(pairs * mask, axis=0), [C]), mask=valid)
    target = score_grads + (row.to(tl.int64) * (H // HEADS) + block) * (C * C)
    ds = tl.reshape(dscores, [C, C]).to(score_grads.dtype.element_ty)
    tl.store(target + in_chunk[:, None] * C + in_chunk[None, :], ds)
