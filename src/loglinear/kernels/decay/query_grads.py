"""QUERY GRADIENTS: dQ, and dλ of the levels above a chunk, by the same walk over the entries as the output."""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.tree.place import locate, log2_of_power, lowbit, path_length
from loglinear.kernels.tree.tiles import load_state, load_tile, store_tile


@triton.jit
def entry_product(do_head, stride_do, valid, do_tile, entry, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                  BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``dO S_eᵀ`` ``[C, BK]``, over tiles of V where one tile does not hold it."""
    if V <= BV:
        state = load_state(entry, 0, 0, K, V, BK, BV)
        product = tl.dot(do_tile, tl.trans(state), input_precision=PRECISION)
    elif V > 2 * BV:  # the loads of all tiles at once would not fit into shared memory
        product = tl.zeros([C, BK], tl.float32)
        for first_v in tl.range(0, V, BV):
            part = load_tile(do_head, stride_do, valid, C, V, BV, first_v)
            state = load_state(entry, 0, first_v, K, V, BK, BV)
            product = tl.dot(part, tl.trans(state), acc=product, input_precision=PRECISION)
    else:
        product = tl.zeros([C, BK], tl.float32)
        for first_v in tl.static_range(0, V, BV):
            part = load_tile(do_head, stride_do, valid, C, V, BV, first_v)
            state = load_state(entry, 0, first_v, K, V, BK, BV)
            product = tl.dot(part, tl.trans(state), acc=product, input_precision=PRECISION)
    return product


@triton.jit
def path_step(scales, entry_log, rows, e, h, n0, in_chunk, stride_s, valid, L, H: tl.constexpr, LOG_C: tl.constexpr):
    """(λ ``[C]`` towards entry e, its log-decay), zero past the end of the path; loaded one step ahead of their use."""
    level = tl.minimum(log2_of_power(tl.maximum(lowbit(e), 1)) + LOG_C + 1, L - 1)
    inside = valid & (tl.zeros_like(in_chunk) + e > n0)
    scale = tl.load(scales + (in_chunk * stride_s + level), mask=inside, other=0.0).to(tl.float32)
    return scale, tl.load(entry_log + (rows + e - 1).to(tl.int64) * H + h, mask=e > n0, other=0.0)


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
    steps = path_length(n, n0)
    for i in range(HEADS):
        h = block * HEADS + i
        scales = level_scales + origin * stride_s + h * L
        gains = row_gain + h.to(tl.int64) * all_tokens + origin + in_chunk
        place = dlevel_scales + origin * (H * L) + h * L + (in_chunk[:, None] * (H * L) + columns[None, :])
        row_sums = tl.load(sums + h.to(tl.int64) * sums_stride + origin + in_chunk, mask=valid, other=0.0)
        scale, log = path_step(scales, entry_log, row0 - n0, n, h, n0, in_chunk, stride_s, valid, L, H, LOG_C)
        if HAS_GATE:
            row_part = tl.load(gains, mask=valid, other=0.0)
        do_head = do + origin * stride_do + h * V
        do_tile = load_tile(do_head, stride_do, valid, C, V, BV, 0)
        gradient = tl.zeros([C, LEVELS], tl.float32)
        e = n
        since = 0.0
        for _ in range(steps):
            unit = (row0 + e - 1 - n0).to(tl.int64) * H + h
            tree_level = log2_of_power(lowbit(e))
            level = tl.minimum(tree_level + LOG_C + 1, L - 1)
            decay = tl.exp2(row_sums + since)
            now = scale * factor
            since += log
            e = e & (e - 1)
            scale, log = path_step(scales, entry_log, row0 - n0, e, h, n0, in_chunk, stride_s, valid, L, H, LOG_C)
            entry = entries + unit * (K * V)
            product = entry_product(do_head, stride_do, valid, do_tile, entry, C, K, V, BK, BV, PRECISION)
            gain = tl.sum(product * q_tile.to(tl.float32), axis=1) * decay
            acc += (now * decay)[:, None] * product
            gradient += tl.where(columns[None, :] == level, (gain * factor)[:, None], 0.0)
            if HAS_GATE:
                row_part += gain * now
                level_place = (tree_level * H + h).to(tl.int64) * rows + row
                tl.store(level_gain + level_place, tl.sum(gain * now, axis=0))
        if L <= LOG_C + 1:  # the last level inside the chunk is that of all entries too
            inside = valid[:, None] & (columns < L)[None, :]
            gradient += tl.load(place, mask=inside, other=0.0).to(tl.float32)
            tl.store(place, gradient.to(dlevel_scales.dtype.element_ty), mask=inside)
        else:
            outside = valid[:, None] & ((columns > LOG_C) & (columns < L))[None, :]
            tl.store(place, gradient.to(dlevel_scales.dtype.element_ty), mask=outside)
        if HAS_GATE:
            tl.store(gains, row_part, mask=valid)
    part = (block % BLOCKS).to(tl.int64) * all_tokens + origin
    store_tile(dq + part * (G * K) + group_head * K, G * K, valid, acc, C, K, BK, 0)
