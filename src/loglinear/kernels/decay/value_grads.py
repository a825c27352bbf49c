"""VALUE GRADIENTS: dV, from the chunk itself and from one gradient that holds everything after it."""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import to_chunk_end
from loglinear.kernels.tree.levels import assemble_mask, local_decays, local_scales
from loglinear.kernels.tree.place import locate
from loglinear.kernels.tree.tiles import load_state, load_tile, store_tile


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "L"])
def value_grads_kernel(
    q,
    k,
    v,
    do,
    level_scales,
    sums,
    chunk_grads,
    dv,
    column_gain,  # [H, B*T] k·dk = v·dv, without the diagonal; completed here
    chunk_gain,  # [rows, H] k·dk of a chunk, from later chunks
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
    BK: tl.constexpr,
    BV: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: H/HEADS x rows, rows fastest. float32: scores, mask, accumulators.

    The diagonal is added apart from the product, in float32: see local_grads.
    """
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
    scores = tl.where(is_diagonal, 0.0, scores)
    # λ of the next head is on its way while this one is computed.
    next_near, next_far = local_scales(
        level_scales + origin * stride_s + block * HEADS * L, valid, stride_s, factor, L, C
    )
    for i in range(HEADS):
        h = block * HEADS + i
        scales = level_scales + origin * stride_s + h * L
        head_sums = sums + h.to(tl.int64) * sums_stride + origin
        near, far = next_near, next_far
        ahead = tl.minimum(h + 1, block * HEADS + HEADS - 1)
        next_near, next_far = local_scales(level_scales + origin * stride_s + ahead * L, valid, stride_s, factor, L, C)
        near_decay, far_decay, column = local_decays(head_sums, size, all_tokens, C, EXACT)
        mask = assemble_mask(near * near_decay, far * far_decay, column, C)
        weights = (scores * tl.reshape(mask, [C, C])).to(do.dtype.element_ty)
        own_scale = tl.load(scales + in_chunk * stride_s, mask=valid, other=0.0).to(tl.float32) * factor
        decay = to_chunk_end(head_sums, size, all_tokens, C, EXACT)
        gains = column_gain + h.to(tl.int64) * all_tokens + origin + in_chunk
        if HAS_GATE:
            inner_part = tl.load(gains, mask=valid, other=0.0)
        later_part = tl.zeros([C], tl.float32)
        for first_v in tl.static_range(0, V, BV):
            do_tile = load_tile(do + origin * stride_do + h * V, stride_do, valid, C, V, BV, first_v)
            state = load_state(chunk_grads + (row.to(tl.int64) * H + h) * (K * V), 0, first_v, K, V, BK, BV)
            later = tl.dot(k_tile, state, input_precision=PRECISION) * decay[:, None]
            if HAS_GATE:
                v_tile = load_tile(v + origin * stride_v + h * V, stride_v, valid, C, V, BV, first_v).to(tl.float32)
                later_part += tl.sum(later * v_tile, axis=1)
            total = tl.dot(tl.trans(weights), do_tile, acc=later, input_precision=PRECISION)
            total += (own_score * own_scale)[:, None] * do_tile.to(tl.float32)
            store_tile(dv + origin * (H * V) + h * V, H * V, valid, total, C, V, BV, first_v)
        if HAS_GATE:
            tl.store(gains, inner_part + later_part, mask=valid)
            tl.store(chunk_gain + row.to(tl.int64) * H + h, tl.sum(later_part, axis=0))
