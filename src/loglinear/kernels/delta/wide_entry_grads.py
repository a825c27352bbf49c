"""WIDE ENTRY GRADIENTS: the gradient ``[dA | dS]`` of every entry of whole octets, from the octets whose path it is on.

Entry ``OCTET * f`` is on the paths of the ``lowbit(f)`` octets from octet f on, its *window*. It is the nearest entry
on the path of f. On the path of m it follows the ``j = set_bits(m - f)`` entries of T_j. So its gradient is the sum
over the window of ``T_jᵀ [dT_{j+1} | d(T_j S)]``. A program sums at most SEGMENT octets; the segments of a longer
window are added by a second kernel in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from loglinear.kernels.delta.entry_grads import map_tile_of_program
from loglinear.kernels.delta.path_states import path_start
from loglinear.kernels.tree.place import OCTET, locate, log2_of_power, lowbit, set_bits
from loglinear.kernels.tree.tiles import load_block, store_part


class Window(NamedTuple):
    """``count`` octets from ``first > f`` on that read entry ``OCTET * f``; ``slot`` is the first slot of octet ``first``."""

    f: Any
    first: Any
    count: Any
    slot: Any


@triton.jit
def octets_sum(total, entries, states, path_grads, at, w, h, first_k, first_n, end, BT: tl.constexpr, S: tl.constexpr):
    """Add tile ``[BK, BN]``, as far as column ``end``, over a window. A product is over BT of the K rows of T at a time."""
    SIZE: tl.constexpr = S.K * (S.K + S.V)
    PARTS: tl.constexpr = (S.K + BT - 1) // BT
    ROWS_MASKED: tl.constexpr = S.K % BT != 0
    slot = w.slot
    for step in range(w.count * PARTS):
        m = w.first + step // PARTS
        chunk = step % PARTS * BT
        j = set_bits(m - w.f)
        # T_1 is the A of the nearest entry.
        nearest = entries + ((at.chunk0 + m * OCTET - 1).to(tl.int64) * S.HEADS + h) * SIZE
        place = ((slot + j).to(tl.int64) * S.H + h) * SIZE
        source = tl.where(j == 1, nearest, states + place)
        left_masked: tl.constexpr = ROWS_MASKED or S.K % S.BK != 0
        left = load_block(source, S.K + S.V, chunk, first_k, 0, S.K, S.K, BT, S.BK, left_masked)
        right_masked: tl.constexpr = ROWS_MASKED or S.K % S.BN != 0 or S.V % S.BN != 0
        right = load_block(path_grads + place, S.K + S.V, chunk, first_n, 0, end, S.K, BT, S.BN, right_masked)
        total = tl.dot(tl.trans(left), right, total, input_precision=S.PRECISION)
        slot += tl.where(chunk + BT >= S.K, set_bits(m), 0)
    return total


@triton.jit(do_not_specialize=["T", "N", "NG", "paths", "units", "slots"])
def wide_entry_grads_kernel(
    entries,  # [chunks, H, K, K+V]
    states,  # [slots, H, K, K+V]: [T_j | T_j S_j], j > 1 read
    path_grads,  # [slots, H, K, K+V]: [dT_{j+1} | d(T_j S_j)]
    grads,  # [chunks + …, H, K, K+V] by entry, or if LONG segments [levels, slots, H, K, K+V]
    path_starts,
    table,
    T,
    N,
    NG,
    paths,
    units,
    slots,
    S: tl.constexpr,
    BT: tl.constexpr,
    SEGMENT: tl.constexpr,
    LONG: tl.constexpr,
):
    """Grid: [levels above SEGMENT, widest first] x octets x H x tiles, tiles fastest. float32: accumulator.

    A program takes the entry that ends with an octet, if the window of this entry is one segment. If LONG, a program takes a
    segment that begins at an octet, for one level of the tree with longer windows. Programs without work return at once.
    """
    first_k, first_n, in_state, h, rest = map_tile_of_program(S)
    octet = rest % units
    at = locate(octet, table, T, N, NG, NG, S.PACKED)
    if at.length < 0:
        return
    chunks = (at.length + S.C - 1) // S.C
    octets = (chunks + OCTET - 1) // OCTET
    if LONG:
        level = S.LEVELS - 1 - rest // units
        first = octet - at.octet0
        span = (2 * SEGMENT) << level
        if (first % SEGMENT != 0) | (first // span % 2 == 0):
            return
        f = first // span * span
        count = tl.minimum(SEGMENT, octets - first)
        target = level.to(tl.int64) * slots + ((at.octet0 + first) // SEGMENT + at.sequence)
    else:
        f = octet - at.octet0 + 1
        span = lowbit(f)
        first = f
        if (span > SEGMENT) | (f * OCTET > chunks):
            return
        count = tl.minimum(span, octets - f)
        target = (at.chunk0 + f * OCTET - 1).to(tl.int64)
    # An entry that begins at the first chunk is the last of every path: nothing is carried past it.
    count = tl.where((in_state == 0) & (f == span), 0, count)
    end = tl.where(in_state, S.K + S.V, S.K)
    column = tl.where(in_state, S.K + first_n, first_n)
    slot = path_start(first, at, path_starts, paths, S.PACKED)
    # On the path of octet f the entry is the nearest, and T the identity.
    nearest = ((first == f) & (count > 0)).to(tl.int32)
    own = path_grads + (slot.to(tl.int64) * S.H + h) * (S.K * (S.K + S.V))
    total = load_block(own, S.K + S.V, first_k, column, 0, end * nearest, S.K, S.BK, S.BN, True).to(tl.float32)
    slot += tl.where(nearest > 0, set_bits(first), 0)
    w = Window(f, first + nearest, count - nearest, slot)
    total = octets_sum(total, entries, states, path_grads, at, w, h, first_k, column, end, BT, S)
    head = grads + (target * S.H + h) * (S.K * (S.K + S.V))
    if in_state:
        store_part(head + S.K, S.K + S.V, total, first_k, first_n, S.K, S.V, S.BK, S.BN)
    else:
        store_part(head, S.K + S.V, total, first_k, first_n, S.K, S.K, S.BK, S.BN)


@triton.jit(do_not_specialize=["T", "N", "NG", "slots"])
def segment_sums_kernel(
    segments, grads, table, T, N, NG, slots, S: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr
):
    """From ``segments [levels, slots, H, K, K+V]`` to ``grads [chunks + …, H, K, K+V]``.

    Grid: octets x H x blocks of ``[K, K+V]``, for the entries that end with an octet and have long windows. float32: sum.
    """
    SIZE: tl.constexpr = S.K * (S.K + S.V)
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    block = pid % BLOCKS
    h = pid // BLOCKS % S.H
    octet = pid // (BLOCKS * S.H)
    at = locate(octet, table, T, N, NG, NG, S.PACKED)
    if at.length < 0:
        return
    f = octet - at.octet0 + 1
    span = lowbit(f)
    chunks = (at.length + S.C - 1) // S.C
    octets = (chunks + OCTET - 1) // OCTET
    if (span <= SEGMENT) | (f * OCTET > chunks):
        return
    level = log2_of_power(span // (2 * SEGMENT))
    count = (tl.minimum(span, octets - f) + SEGMENT - 1) // SEGMENT
    elements = block * BLOCK + tl.arange(0, BLOCK)
    inside = elements < SIZE
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(count):
        source = level.to(tl.int64) * slots + ((at.octet0 + f) // SEGMENT + i + at.sequence)
        total += tl.load(segments + (source * S.H + h) * SIZE + elements, mask=inside, other=0.0).to(tl.float32)
    target = grads + ((at.chunk0 + f * OCTET - 1).to(tl.int64) * S.H + h) * SIZE
    tl.store(target + elements, total.to(grads.dtype.element_ty), mask=inside)
