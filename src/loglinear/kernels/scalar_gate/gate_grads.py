"""GATE GRADIENTS: dg of a token is the sum over all pairs (query, key) that its decay lies between.

Pairs that span the end of a group come level by level from sums over at most half a block of the tree (*crossings* before
the middle of the block, *level gains* after it), so that nothing is ever subtracted over more than a group. Inside it,
pairs enter with the query (q·dq) and leave with the key (k·dk), backwards: a chunk's total, then a token at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.common import GATE_FLOOR, GROUP, LOG_GROUP, locate


@triton.jit
def strided_sum(base, stride, count):
    """Sum of ``count`` float32 values ``stride`` apart, in blocks of 128."""
    total = 0.0
    block = tl.arange(0, 128)
    for i in range((count + 127) // 128):
        index = i * 128 + block
        total += tl.sum(tl.load(base + index.to(tl.int64) * stride, mask=index < count, other=0.0), axis=0)
    return total


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "rows", "high_levels"])
def gate_grads_kernel(
    g,
    crossings,  # [groups, H, levels, TILES]
    level_gain,  # [tree levels, H, rows]
    chunk_gain,  # [rows, H]
    row_gain,  # [H, B*T]
    column_gain,  # [H, B*T]
    dg,  # [B*T, H]
    group_sequence,
    sequences,
    T,
    N,
    NG,
    all_tokens,
    stride_g,
    rows,
    high_levels,
    H: tl.constexpr,
    C: tl.constexpr,
    TILES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid: groups x H. float32 throughout."""
    pid = tl.program_id(0)
    h = pid % H
    group = pid // H
    start, length, row0, group0, n0, _ = locate(group, group_sequence, sequences, T, N, NG, NG, PACKED)
    if length < 0:
        return
    oldest = n0 // GROUP
    j = oldest + group - group0
    chunks = (length + C - 1) // C
    end = (n0 + chunks + GROUP - 1) // GROUP
    crossing = 0.0
    for level in range(high_levels):
        span = tl.cast(1, tl.int32) << level
        middle = j // (2 * span) * (2 * span) + span  # first group of the window of this level's entry
        if j < middle:
            if middle < end:
                # Keys of the entry's groups up to j, for the queries of the whole window.
                first = tl.maximum(middle - span, oldest)
                unit = (group0 + first - oldest).to(tl.int64) * H + h
                for t in range(TILES):
                    base = crossings + (unit * high_levels + level) * TILES + t
                    crossing += strided_sum(base, H * high_levels * TILES, j + 1 - first)
        else:
            # Queries of the window's chunks after j, for the keys of the whole entry, if it has any here.
            first = (j + 1) * GROUP - n0
            last = tl.minimum((middle + span) * GROUP - n0, chunks)
            if (last > first) & (middle * GROUP > n0):
                base = level_gain + (h + (level + LOG_GROUP) * H).to(tl.int64) * rows + row0 + first
                crossing += strided_sum(base, 1, last - first)
    in_chunk = tl.arange(0, C)
    tree_levels = tl.arange(0, 32)
    for i in range(GROUP):
        local = j * GROUP + GROUP - 1 - i - n0
        if (local >= 0) & (local < chunks):
            position = local * C + in_chunk
            valid = position < length
            tokens = start + position
            gains = h.to(tl.int64) * all_tokens + tokens
            gain = tl.load(row_gain + gains, mask=valid, other=0.0)
            loss = tl.load(column_gain + gains, mask=valid, other=0.0)
            gradient = crossing + tl.cumsum(gain - loss, axis=0, reverse=True)
            gate = tl.load(g + tokens.to(tl.int64) * stride_g + h, mask=valid, other=0.0)
            gradient = tl.where(gate.to(tl.float32) > GATE_FLOOR, gradient, 0.0)
            tl.store(dg + tokens.to(tl.int64) * H + h, gradient.to(dg.dtype.element_ty), mask=valid)
            # Over the chunk's beginning: pairs of its queries with earlier chunks come in, those of its keys with later go.
            n = n0 + local
            place = (tree_levels * H + h).to(tl.int64) * rows + row0 + local
            reads = ((n >> tree_levels) & 1 == 1) & ((n >> tree_levels << tree_levels) > n0)
            entered = tl.sum(tl.load(level_gain + place, mask=reads, other=0.0), axis=0)
            crossing += entered - tl.load(chunk_gain + (row0 + local).to(tl.int64) * H + h)
