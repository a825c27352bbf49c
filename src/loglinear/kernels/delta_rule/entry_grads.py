"""ENTRY GRADIENTS: the gradient ``[dA | dS]`` of every entry, from the chunks that read it.

Entry e is read by its *window*, the ``lowbit(e)`` chunks from chunk e on. A chunk's queries Q, as they meet the entry, are
seen from its end, so nothing decays: the gradient is the sum over the window of ``Qᵀ [dQ' | λ ∘ dO]``. A program sums at most
SEGMENT chunks; the segments of a longer window are added by a second kernel in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.common import GROUP, load_tile, locate, log2_of_power, lowbit
from loglinear.kernels.delta_rule.path_queries import path_start
from loglinear.kernels.delta_rule.tiles import load_part, store_part


@triton.jit
def set_bits(x):
    """Number of bits set in 0 <= x < 2^24. Without a loop, which would keep the loop around it from being pipelined."""
    x = x - (x >> 1 & 0x555555)
    x = (x & 0x333333) + (x >> 2 & 0x333333)
    x = x + (x >> 4) & 0x0F0F0F
    return (x * 0x010101 >> 16) & 0xFF


@triton.jit
def window_sum(path_queries, path_grads, do, scales, e, first, count, slot, length, h, first_k, first_n, stride_do,
               stride_s, factor, STATE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
               BK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Tile ``[BK, BN]`` of dS (STATE) or dA, over ``count`` chunks from ``first`` on, whose paths start at ``slot``.

    do and scales (at the entry's level) point at token 0 of the sequence.
    """
    in_chunk = tl.arange(0, C)
    own = set_bits(e)
    total = tl.zeros([BK, BN], tl.float32)
    for i in range(count):
        n = first + i
        above = set_bits(n - e)
        place = ((slot + above).to(tl.int64) * H + h) * (C * K)
        slot += above + own
        queries = load_part(path_queries + place, 0, first_k, K, C, K, C, BK)
        if STATE:
            valid = in_chunk < length - n * C
            origin = (n * C).to(tl.int64)
            tile = load_tile(do + origin * stride_do, stride_do, valid, C, V, BN, first_n)
            scale = tl.load(scales + origin * stride_s + in_chunk * stride_s, mask=valid, other=0.0)
            weighted = (tile.to(tl.float32) * (scale.to(tl.float32) * factor)[:, None]).to(tile.dtype)
        else:
            weighted = load_part(path_grads + place, 0, first_n, K, C, K, C, BN)
        total = tl.dot(tl.trans(queries), weighted, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["T", "N", "NG", "paths", "L", "units", "slots"])
def entry_grads_kernel(
    do,
    level_scales,
    path_queries,
    path_grads,
    grads,  # [rows + …, H, K, K+V] by entry, or if LONG segments [levels, slots, H, K, K+V]
    path_starts,
    unit_sequence,
    sequences,
    T,
    N,
    NG,
    paths,
    stride_do,
    stride_s,
    factor,
    L,
    units,
    slots,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LOG_C: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    SEGMENT: tl.constexpr,
    LONG: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: [levels above SEGMENT, widest first] x units x H x tiles, tiles fastest. float32: accumulator, weights.

    Units are rows: the window of each row's entry, if it is one segment. If LONG they are groups: the segments that
    begin at a group, one for each level of the tree whose windows are longer; programs without one return at once.
    """
    TILES_A: tl.constexpr = (K + BN - 1) // BN
    TILES_N: tl.constexpr = TILES_A + (V + BN - 1) // BN
    TILES: tl.constexpr = (K + BK - 1) // BK * TILES_N
    pid = tl.program_id(0)
    tile_n = pid % TILES_N
    first_k = pid % TILES // TILES_N * BK
    h = pid // TILES % H
    unit = pid // (TILES * H) % units
    start, length, row0, group0, _, sequence = locate(
        unit, unit_sequence, sequences, T, N, NG, NG if LONG else N, PACKED
    )
    if length < 0:
        return
    chunks = (length + C - 1) // C
    if LONG:
        level = tl.num_programs(0) // (TILES * H * units) - 1 - pid // (TILES * H * units)
        first = (unit - group0) * GROUP
        span = (2 * SEGMENT) << level
        if (first % SEGMENT != 0) | (first // span % 2 == 0):
            return
        e = first // span * span
        count = tl.minimum(SEGMENT, chunks - first)
        target = level.to(tl.int64) * slots + ((row0 + first) // SEGMENT + sequence)
    else:
        e = unit - row0 + 1
        span = lowbit(e)
        first = e
        if span > SEGMENT:
            return
        count = tl.minimum(span, chunks - first)
        target = unit.to(tl.int64)
    scale_level = tl.minimum(log2_of_power(span) + LOG_C + 1, L - 1)
    slot = path_start(first, sequence, path_starts, paths, PACKED)
    head = grads + (target * H + h) * (K * (K + V))
    origin = start.to(tl.int64)
    scales = level_scales + origin * stride_s + h * L + scale_level
    values = do + origin * stride_do + h * V
    if tile_n < TILES_A:
        # An entry that begins at the first chunk is the last of every path.
        reads = tl.where(e == span, 0, count)
        total = window_sum(path_queries, path_grads, values, scales, e, first, reads, slot, length, h, first_k,
                           tile_n * BN, stride_do, stride_s, factor, False, H, K, V, C, BK, BN, PRECISION)  # fmt: skip
        store_part(head, total, first_k, tile_n * BN, K, K, K + V, BK, BN)
    else:
        first_n = (tile_n - TILES_A) * BN
        total = window_sum(path_queries, path_grads, values, scales, e, first, count, slot, length, h, first_k, first_n,
                           stride_do, stride_s, factor, True, H, K, V, C, BK, BN, PRECISION)  # fmt: skip
        store_part(head + K, total, first_k, first_n, V, K, K + V, BK, BN)


@triton.jit(do_not_specialize=["T", "N", "NG", "units", "slots"])
def segment_sums_kernel(
    segments,  # [levels, slots, H, SIZE]
    grads,  # [rows + …, H, SIZE]
    unit_sequence,
    sequences,
    T,
    N,
    NG,
    units,
    slots,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid: groups x H x blocks of ``[K, K+V]``, for the entries that end with a group and have long windows. float32: sum."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    block = pid % BLOCKS
    h = pid // BLOCKS % H
    unit = pid // (BLOCKS * H)
    _, length, row0, group0, _, sequence = locate(unit, unit_sequence, sequences, T, N, NG, NG, PACKED)
    if length < 0:
        return
    e = (unit - group0 + 1) * GROUP
    span = lowbit(e)
    chunks = (length + C - 1) // C
    if (span <= SEGMENT) | (e > chunks):
        return
    level = log2_of_power(span // (2 * SEGMENT))
    count = (tl.minimum(span, chunks - e) + SEGMENT - 1) // SEGMENT
    elements = block * BLOCK + tl.arange(0, BLOCK)
    inside = elements < SIZE
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(count):
        source = level.to(tl.int64) * slots + ((row0 + e) // SEGMENT + i + sequence)
        total += tl.load(segments + (source * H + h) * SIZE + elements, mask=inside, other=0.0).to(tl.float32)
    target = grads + ((row0 + e - 1).to(tl.int64) * H + h) * SIZE
    tl.store(target + elements, total.to(grads.dtype.element_ty), mask=inside)
