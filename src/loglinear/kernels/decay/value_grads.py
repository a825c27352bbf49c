"""VALUE GRADIENTS: dV, from the chunk itself and from one gradient that holds everything after it."""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.decays import to_end
from loglinear.kernels.tree.levels import assemble_mask, chunk_scales, local_decays, scales_of
from loglinear.kernels.tree.place import chunk_of, row_of_program
from loglinear.kernels.tree.tiles import load_entry, load_tokens, store_tokens


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "L"])
def value_grads_kernel(x, L, states, chunk_grads, dv, gains, table, T, N, NG, all_tokens, sums_stride, S: tl.constexpr):
    """Grid: H/HEADS x chunks, chunks fastest. float32: scores, mask, accumulators.

    The diagonal is added apart from the product, in float32: see local_grads. Completes the gains ``columns``, k·dk = v·dv
    without the diagonal, and writes ``chunks``, k·dk of a chunk, from later chunks.
    """
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
    scores = tl.where(is_diagonal, 0.0, scores)
    # λ of the next head is on its way while this one is computed.
    next_near, next_far = chunk_scales(x, here, block * S.HEADS, L, S)
    for i in range(S.HEADS):
        h = block * S.HEADS + i
        head_sums = states.sums + h.to(tl.int64) * sums_stride + here.origin
        near, far = next_near, next_far
        next_near, next_far = chunk_scales(x, here, tl.minimum(h + 1, block * S.HEADS + S.HEADS - 1), L, S)
        near_decay, far_decay, column = local_decays(head_sums, here.size, all_tokens, S)
        mask = assemble_mask(near * near_decay, far * far_decay, column, S.C)
        weights = (scores * tl.reshape(mask, [S.C, S.C])).to(x.do.dtype.element_ty)
        own_scales = scales_of(x, here, h, L) + in_chunk * x.stride_scales
        own_scale = tl.load(own_scales, mask=here.valid, other=0.0).to(tl.float32) * x.factor
        decay = to_end(head_sums, here.size, all_tokens, S)
        column_gains = gains.columns + h.to(tl.int64) * all_tokens + here.origin + in_chunk
        if x.g is not None:
            inner_part = tl.load(column_gains, mask=here.valid, other=0.0)
        site = chunk.to(tl.int64) * S.H + h
        later_part = tl.zeros([S.C], tl.float32)
        for first_v in tl.static_range(0, S.V, S.BV):
            do_tile = load_tokens(x.do, x.stride_do, h, here, S.C, S.V, S.BV, first_v)
            state = load_entry(chunk_grads, site, 0, first_v, S)
            later = tl.dot(k_tile, state, input_precision=S.PRECISION) * decay[:, None]
            if x.g is not None:
                v_tile = load_tokens(x.v, x.stride_v, h, here, S.C, S.V, S.BV, first_v).to(tl.float32)
                later_part += tl.sum(later * v_tile, axis=1)
            total = tl.dot(tl.trans(weights), do_tile, acc=later, input_precision=S.PRECISION)
            total += (own_score * own_scale)[:, None] * do_tile.to(tl.float32)
            store_tokens(dv, S.H * S.V, h, here, total, S.C, S.V, S.BV, first_v)
        if x.g is not None:
            tl.store(column_gains, inner_part + later_part, mask=here.valid)
            tl.store(gains.chunks + chunk.to(tl.int64) * S.H + h, tl.sum(later_part, axis=0))
