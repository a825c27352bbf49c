"""MAP GRADIENTS: back through the chunks of a group, and what each gives to its keys and values on the way.

A chunk takes a map Y before it to ``γ_C Y + K_endᵀ D`` with ``D = [0 | U] - W Y``, and X is the gradient of that. Two thin
products, ``K_end X`` and D, are all that is needed: the first is the gradient of D, so that of U in the columns of S and, times
Yᵀ, that of -W; ``D Xᵀ`` is the gradient of K_end; and before the chunk X is ``γ_C X - Wᵀ (K_end X)``. So X, a matrix
``[K, K+V]``, stays in registers from the last chunk of a group to its first. Columns do not meet but in the sums over them,
of which every block of columns leaves its share.

A program walks twice: the *pair* of chunks 5 and 4, whose map is an entry by itself, then the *prefix*, all chunks, where an
entry's own gradient is added as its last chunk comes. Entries of a single chunk are in leaf.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.common import GROUP, load_tile
from loglinear.kernels.delta_rule.group_maps import (
    FIRST_PAIRED,
    PREFIXES,
    decay_to_end,
    load_added,
    load_square,
    locate_group,
    prefix_slot,
)
from loglinear.kernels.delta_rule.products import memory_times, tokens_times
from loglinear.kernels.delta_rule.tiles import load_part, load_part_if, store_part


@triton.jit
def has_pair(here):
    """Whether the pair of a group of ``here`` chunks is an entry."""
    return here > FIRST_PAIRED + 1


@triton.jit
def share_slot(paired, c, row, group, rows):
    """Where the shares of a chunk of the prefix or of the pair are, of ``rows`` rows and two more for each group."""
    return tl.where(paired, rows + 2 * group + c - FIRST_PAIRED, row)


@triton.jit
def map_before(prefixes, entries, paired, c, row, group, groups, h, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Pointer to the map before chunk c: the identity, an entry (before 1, 2 and 4, and in the pair) or a kept prefix."""
    is_entry = tl.where(paired, c > FIRST_PAIRED, (c == 1) | (c == 2) | (c == 4))
    is_first = tl.where(paired, c == FIRST_PAIRED, c == 0)
    place = tl.where(is_first, groups * PREFIXES, prefix_slot(c, group))
    entry = entries + ((row - 1).to(tl.int64) * HEADS + h) * SIZE
    return tl.where(is_entry, entry, prefixes + (place.to(tl.int64) * HEADS + h) * SIZE)


@triton.jit
def store_value_share(target, change, first, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BN: tl.constexpr):
    """Write those rows of ``change [BN, C]``, the columns of a map from ``first`` on, that belong to S into ``[V, C]``."""
    columns = first - K + tl.arange(0, BN)
    pointers = target + (columns[:, None] * C + tl.arange(0, C)[None, :])
    tl.store(pointers, change.to(target.dtype.element_ty), mask=((columns >= 0) & (columns < V))[:, None])


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "rows"])
def map_grads_kernel(
    k,
    sums,
    chunk_log,
    writes,
    prefixes,  # [4 groups + 1, H, K, K+V]
    entries,
    map_grads,  # [groups, H, K, K+V] gradients of the groups' whole maps, unless TOP
    grads,  # [rows / 2 + spare rows, H, K, K+V] gradients of the entries of two chunks or more
    key_shares,  # [rows + 2 groups, blocks, H, 2, C, K]: of the gradients of W and of K through K_end
    value_shares,  # [rows + 2 groups, H, V, C]: the gradient of U
    traces,  # [rows + 2 groups, blocks, H] what the chunk's decay adds to dG, but for a factor of this decay
    group_sequence,
    sequences,
    T,
    N,
    NG,
    all_tokens,
    sums_stride,
    stride_k,
    rows,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    TOP: tl.constexpr,
    HAS_GATE: tl.constexpr,
    EXACT: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: groups x H x blocks of columns, blocks fastest. float32: X, accumulators, decays."""
    WIDTH: tl.constexpr = K + V
    BLOCKS: tl.constexpr = (WIDTH + BN - 1) // BN
    groups = tl.num_programs(0) // (BLOCKS * H)
    pid = tl.program_id(0)
    block = pid % BLOCKS
    first = block * BN
    h = pid // BLOCKS % H
    group = pid // (BLOCKS * H)
    start, length, _, units, row0, group0 = locate_group(group, group_sequence, sequences, T, N, NG, C, 0, PACKED)
    if length < 0:
        return
    first_unit = (group - group0) * GROUP
    here = tl.minimum(units - first_unit, GROUP)
    k_head = k + h // (H // G) * K
    head_sums = sums + h.to(tl.int64) * sums_stride
    dtype = grads.dtype.element_ty
    pairs = tl.where(has_pair(here), 2, 0)
    x = tl.zeros([BK, BN], tl.float32)
    for i in range(pairs + here):
        paired = i < pairs
        c = tl.where(paired, FIRST_PAIRED + 1 - i, here - 1 + pairs - i)
        local = first_unit + c
        row = row0 + local
        # Nothing reads a map that ends with a group that is not whole; the top tier's whole map is no entry either.
        joins = tl.where(paired, i == 0, (c == 1) | (c == 3) | ((c + 1 == GROUP) & (not TOP)))
        if joins | (i == pairs):
            x = tl.where(i == pairs, 0.0, x)
            own = grads + ((row // 2).to(tl.int64) * H + h) * (K * WIDTH)
            whole = map_grads + (group.to(tl.int64) * H + h) * (K * WIDTH)
            gradient = tl.where(c + 1 == GROUP, whole, own)
            x += load_part_if(joins, gradient, 0, first, WIDTH, K, WIDTH, BK, BN).to(tl.float32)
        kept = row.to(tl.int64) * HEADS + h
        valid = tl.arange(0, C) < length - local * C
        origin = (start + local * C).to(tl.int64)
        written = writes + kept * (C * WIDTH)
        to_end = decay_to_end(head_sums + origin, tl.minimum(length - local * C, C), all_tokens, C, EXACT)
        decay = tl.exp2(tl.load(chunk_log + kept))
        slot = share_slot(paired, c, row, group, rows)
        part = (slot.to(tl.int64) * BLOCKS + block) * H + h
        low = x.to(dtype)
        # Transposed, as a product of BN rows: the C rows of K_end X would not occupy eight warps.
        if PRECISION == "ieee":
            change = tl.trans(tokens_times(k_head + origin * stride_k, stride_k, valid, low, C, K, BK, BN, PRECISION))
        else:
            k_tile = load_tile(k_head + origin * stride_k, stride_k, valid, C, K, BK, 0)
            change = tl.dot(tl.trans(low), tl.trans(k_tile), input_precision=PRECISION)
        change = (change * -to_end[None, :]).to(dtype)
        before = map_before(prefixes, entries, paired, c, row, group, groups, h, HEADS, K * WIDTH)
        y = load_part(before, 0, first, WIDTH, K, WIDTH, BK, BN)
        if HAS_GATE:
            tl.store(traces + part, tl.sum(x * y.to(tl.float32)))
        targets = key_shares + part * (2 * C * K)
        dw = tl.dot(tl.trans(change), tl.trans(y), input_precision=PRECISION)
        store_part(targets, dw, 0, 0, K, C, K, C, BK)
        if first + BN > K:
            store_value_share(value_shares + (slot.to(tl.int64) * H + h) * (C * V), -change, first, K, V, C, BN)
        erased = load_square(written, WIDTH, C, K, C, BK)
        added = tl.trans(load_added(written, first, WIDTH, C, K, C, BN)).to(tl.float32)
        if PRECISION == "ieee":
            added -= tl.trans(memory_times(written, y, WIDTH, C, K, C, BK, BN, PRECISION))
        else:
            added -= tl.dot(tl.trans(y), tl.trans(erased), input_precision=PRECISION)
        dk = tl.dot(tl.trans(added.to(dtype)), tl.trans(low), input_precision=PRECISION)
        store_part(targets + C * K, dk * to_end[:, None], 0, 0, K, C, K, C, BK)
        x = tl.dot(tl.trans(erased), tl.trans(change), x * decay, input_precision=PRECISION)
