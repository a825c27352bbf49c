"""QUERY GRADIENTS: dQ, and dλ of the levels above a chunk, by the same walk over the entries as the output."""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.common import load_state, load_tile, locate, log2_of_power, lowbit, path_length, store_tile


@triton.jit
def entry_product(do_head, stride_do, valid, do_tile, entry, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                  BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``dO S_eᵀ`` ``[C, BK]``, over tiles of V where one tile does not hold it."""
    if V <= BV:
        state = load_state(entry, 0, 0, K, V, BK, BV)
        product = tl.dot(do_tile, tl.trans(state), input_precision=PRECISION)
    else:
        product = tl.zeros([C, BK], tl.float32)
        for first_v in tl.static_range(0, V, BV):
            part = load_tile(do_head, stride_do, valid, C, V, BV, first_v)
            state = load_state(entry, 0, first_v, K, V, BK, BV)
            product = tl.dot(part, tl.trans(state), acc=product, input_precision=PRECISION)
    return product


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "L"])
def query_grads_kernel(
    q,
    k,
    do,
    level_scales,
    sums,
    entries,
    entry_log,
    score_grads,
    dq,  # [H / HEADS / G, B*T, G, K], float32 partial sums unless the first size is 1
    dlevel_scales,
    row_gain,
    level_gain,  # [tree levels, H, rows] q·dq of a chunk through its entry of each level
    row_sequence,
    sequences,
    T,
    N,
    NG,
    all_tokens,
    sums_stride,
    stride_q,
    stride_k,
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
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: H/HEADS x rows, rows fastest. float32: accumulators, dλ, weights."""
    BLOCKS: tl.constexpr = H // G // HEADS
    rows = tl.num_programs(0) // (H // HEADS)
    pid = tl.program_id(0)
    row = pid % rows
    block = pid // rows
    start, length, row0, _, n0, _ = locate(row, row_sequence, sequences, T, N, NG, N, PACKED)
    if length < 0:
        return
    local = row - row0
    n = n0 + local
    in_chunk = tl.arange(0, C)
    valid = in_chunk < length - local * C
    origin = (start + local * C).to(tl.int64)
    group_head = block // BLOCKS
    q_tile = load_tile(q + origin * stride_q + group_head * K, stride_q, valid, C, K, BK, 0)
    k_tile = load_tile(k + origin * stride_k + group_head * K, stride_k, valid, C, K, BK, 0)
    source = score_grads + (row.to(tl.int64) * (H // HEADS) + block) * (C * C)
    ds = tl.load(source + in_chunk[:, None] * C + in_chunk[None, :])
    acc = tl.dot(ds, k_tile, input_precision=PRECISION)
    columns = tl.arange(0, LEVELS)
    for i in range(HEADS):
        h = block * HEADS + i
        scales = level_scales + origin * stride_s + h * L
        row_sums = tl.load(sums + h.to(tl.int64) * sums_stride + origin + in_chunk, mask=valid, other=0.0)
        do_head = do + origin * stride_do + h * V
        do_tile = load_tile(do_head, stride_do, valid, C, V, BV, 0)
        gradient = tl.zeros([C, LEVELS], tl.float32)
        row_part = tl.zeros([C], tl.float32)
        e = n
        since = 0.0
        for _ in range(path_length(n, n0)):
            span = lowbit(e)
            unit = (row0 + e - 1 - n0).to(tl.int64) * H + h
            tree_level = log2_of_power(span)
            level = tl.minimum(tree_level + LOG_C + 1, L - 1)
            scale = tl.load(scales + (in_chunk * stride_s + level), mask=valid, other=0.0).to(tl.float32) * factor
            entry = entries + unit * (K * V)
            product = entry_product(do_head, stride_do, valid, do_tile, entry, C, K, V, BK, BV, PRECISION)
            decay = tl.exp2(row_sums + since)
            gain = tl.sum(product * q_tile.to(tl.float32), axis=1) * decay
            acc += (scale * decay)[:, None] * product
            gradient += tl.where(columns[None, :] == level, (gain * factor)[:, None], 0.0)
            if HAS_GATE:
                row_part += gain * scale
                place = (tree_level * H + h).to(tl.int64) * rows + row
                tl.store(level_gain + place, tl.sum(gain * scale, axis=0))
            since += tl.load(entry_log + unit)
            e -= span
        place = dlevel_scales + origin * (H * L) + h * L + (in_chunk[:, None] * (H * L) + columns[None, :])
        in_levels = valid[:, None] & (columns < L)[None, :]
        inside = valid[:, None] & (columns < tl.minimum(L, LOG_C + 1))[None, :]
        gradient += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, gradient.to(dlevel_scales.dtype.element_ty), mask=in_levels)
        if HAS_GATE:
            gains = row_gain + h.to(tl.int64) * all_tokens + origin + in_chunk
            tl.store(gains, tl.load(gains, mask=valid, other=0.0) + row_part, mask=valid)
    part = (block % BLOCKS).to(tl.int64) * all_tokens + origin
    store_tile(dq + part * (G * K) + group_head * K, G * K, valid, acc, C, K, BK, 0)
