"""WIDE ENTRY GRADIENTS: the gradient ``[dA | dS]`` of every entry of whole groups, from the groups whose path it is on.

Entry ``GROUP * f`` is on the paths of the ``lowbit(f)`` groups from group f on, its *window*. It is the nearest entry
on the path of f. On the path of m it follows the ``j = set_bits(m - f)`` entries of T_j. So its gradient is the sum
over the window of ``T_jᵀ [dT_{j+1} | d(T_j S)]``. A program sums at most SEGMENT groups; the segments of a longer
window are added by a second kernel in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.delta.path_states import path_start
from loglinear.kernels.delta.products import load_block
from loglinear.kernels.delta.tiles import store_part
from loglinear.kernels.tree.place import GROUP, locate, log2_of_power, lowbit, set_bits


@triton.jit
def groups_sum(total, entries, states, path_grads, f, first, count, slot, row0, h, first_k, first_n, end,
               H: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
               BT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add tile ``[BK, BN]``, as far as column ``end``, of ``count`` groups from ``first > f`` on; ``slot`` is that of first.

    A product is over BT of the K rows of T at a time.
    """
    SIZE: tl.constexpr = K * (K + V)
    PARTS: tl.constexpr = (K + BT - 1) // BT
    for step in range(count * PARTS):
        m = first + step // PARTS
        row = step % PARTS * BT
        j = set_bits(m - f)
        # T_1 is the A of the nearest entry.
        nearest = entries + ((row0 + m * GROUP - 1).to(tl.int64) * HEADS + h) * SIZE
        place = ((slot + j).to(tl.int64) * H + h) * SIZE
        source = tl.where(j == 1, nearest, states + place)
        left = load_block(source, row, first_k, 0, K, K + V, K, BT, BK, K % BT != 0 or K % BK != 0)
        right = load_block(path_grads + place, row, first_n, 0, end, K + V, K, BT, BN,
                           K % BT != 0 or K % BN != 0 or V % BN != 0)  # fmt: skip
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
        slot += tl.where(row + BT >= K, set_bits(m), 0)
    return total


@triton.jit(do_not_specialize=["T", "N", "NG", "paths", "units", "slots"])
def wide_entry_grads_kernel(
    entries,  # [rows, H, K, K+V]
    states,  # [slots, H, K, K+V]: [T_j | T_j S_j], j > 1 read
    path_grads,  # [slots, H, K, K+V]: [dT_{j+1} | d(T_j S_j)]
    grads,  # [rows + …, H, K, K+V] by entry, or if LONG segments [levels, slots, H, K, K+V]
    path_starts,
    group_sequence,
    sequences,
    T,
    N,
    NG,
    paths,
    units,
    slots,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    SEGMENT: tl.constexpr,
    LONG: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: [levels above SEGMENT, widest first] x groups x H x tiles, tiles fastest. float32: accumulator.

    A program takes the entry that ends with a group, if the window of this entry is one segment. If LONG, a program takes a
    segment that begins at a group, for one level of the tree with longer windows. Programs without work return at once.
    """
    TILES_A: tl.constexpr = (K + BN - 1) // BN
    TILES_N: tl.constexpr = TILES_A + (V + BN - 1) // BN
    TILES: tl.constexpr = (K + BK - 1) // BK * TILES_N
    pid = tl.program_id(0)
    tile_n = pid % TILES_N
    first_k = pid % TILES // TILES_N * BK
    h = pid // TILES % H
    group = pid // (TILES * H) % units
    _, length, row0, group0, _, sequence = locate(group, group_sequence, sequences, T, N, NG, NG, PACKED)
    if length < 0:
        return
    chunks = (length + C - 1) // C
    groups = (chunks + GROUP - 1) // GROUP
    if LONG:
        level = tl.num_programs(0) // (TILES * H * units) - 1 - pid // (TILES * H * units)
        first = group - group0
        span = (2 * SEGMENT) << level
        if (first % SEGMENT != 0) | (first // span % 2 == 0):
            return
        f = first // span * span
        count = tl.minimum(SEGMENT, groups - first)
        target = level.to(tl.int64) * slots + ((group0 + first) // SEGMENT + sequence)
    else:
        f = group - group0 + 1
        span = lowbit(f)
        first = f
        if (span > SEGMENT) | (f * GROUP > chunks):
            return
        count = tl.minimum(span, groups - f)
        target = (row0 + f * GROUP - 1).to(tl.int64)
    # An entry that begins at the first chunk is the last of every path: nothing is carried past it.
    count = tl.where((tile_n < TILES_A) & (f == span), 0, count)
    end = tl.where(tile_n < TILES_A, K, K + V)
    first_n = tl.where(tile_n < TILES_A, tile_n * BN, K + (tile_n - TILES_A) * BN)
    slot = path_start(first, sequence, path_starts, paths, PACKED)
    # On the path of group f the entry is the nearest, and T the identity.
    nearest = ((first == f) & (count > 0)).to(tl.int32)
    own = path_grads + (slot.to(tl.int64) * H + h) * (K * (K + V))
    total = load_block(own, first_k, first_n, 0, end * nearest, K + V, K, BK, BN, True).to(tl.float32)
    slot += tl.where(nearest > 0, set_bits(first), 0)
    total = groups_sum(total, entries, states, path_grads, f, first + nearest, count - nearest, slot, row0, h, first_k,
                       first_n, end, H, HEADS, K, V, BK, BN, BT, PRECISION)  # fmt: skip
    head = grads + (target * H + h) * (K * (K + V))
    if tile_n < TILES_A:
        store_part(head, total, first_k, first_n, K, K, K + V, BK, BN)
    else:
        store_part(head + K, total, first_k, first_n - K, V, K, K + V, BK, BN)


@triton.jit(do_not_specialize=["T", "N", "NG", "slots"])
def segment_sums_kernel(
    segments,  # [levels, slots, H, SIZE]
    grads,  # [rows + …, H, SIZE]
    group_sequence,
    sequences,
    T,
    N,
    NG,
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
    group = pid // (BLOCKS * H)
    _, length, row0, group0, _, sequence = locate(group, group_sequence, sequences, T, N, NG, NG, PACKED)
    if length < 0:
        return
    f = group - group0 + 1
    span = lowbit(f)
    chunks = (length + C - 1) // C
    groups = (chunks + GROUP - 1) // GROUP
    if (span <= SEGMENT) | (f * GROUP > chunks):
        return
    level = log2_of_power(span // (2 * SEGMENT))
    count = (tl.minimum(span, groups - f) + SEGMENT - 1) // SEGMENT
    elements = block * BLOCK + tl.arange(0, BLOCK)
    inside = elements < SIZE
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(count):
        source = level.to(tl.int64) * slots + ((group0 + f) // SEGMENT + i + sequence)
        total += tl.load(segments + (source * H + h) * SIZE + elements, mask=inside, other=0.0).to(tl.float32)
    target = grads + ((row0 + f * GROUP - 1).to(tl.int64) * H + h) * SIZE
    tl.store(target + elements, total.to(grads.dtype.element_ty), mask=inside)
