"""GROUP MAPS: the entries inside every group of units, and the map of the whole group, one tier of the tree at a time.

A map ``[A | S]`` is applied to another as to any state, ``X <- A X + [0 | S]``, and columns of X do not meet: a program
owns a block of columns of one group's maps and walks the group's units. Some programs keep the *prefix* of the group,
which is the entry after 1, 2, 4 and 8 units. The other programs keep the *pair* of units 4 and 5, which is the entry
after 6. The units of tier 0 are chunks. The map of a chunk is applied as two thin products and never formed. The entry
of a single chunk is written only for the backward, which needs the entries of units 0 and 4. The units of a higher tier
are the groups of the tier below. So the longest chain has eight units a tier, and no program walks a sequence.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.delta.products import memory_times
from loglinear.kernels.tree.decays import decay_between, load_sum
from loglinear.kernels.tree.place import GROUP, LOG_GROUP, locate
from loglinear.kernels.tree.tiles import load_tile

FIRST_PAIRED = tl.constexpr(4)  # units 4 and 5 are a pair that is an entry; 0 to 3 belong to the prefix
PREFIXES = tl.constexpr(4)  # prefixes of a group that are neither ``[I | 0]`` nor an entry: before units 3, 5, 6, 7


@triton.jit
def locate_group(group, table, T, N, NG, TIER: tl.constexpr, S: tl.constexpr):
    """(first token of the sequence, its tokens or -1, its first unit, whole units, first row, first group) of a group.

    Tokens are known in tier 0 only. All chunks count as whole.
    """
    start, length, row0, group0, _, _ = locate(group, table, T, N, NG, NG, S.PACKED)
    if TIER == 0:
        unit0 = row0
        units = (length + S.C - 1) // S.C
    else:
        unit0 = start
        units = (length if S.PACKED else N) >> (LOG_GROUP * TIER)
    return start, length, unit0, units, row0, group0


@triton.jit
def prefix_slot(c, group):
    """The index of the prefix before unit c of a group, if it is one of the PREFIXES."""
    return group * PREFIXES + tl.maximum(c - 4, 0)


@triton.jit
def map_tile(base, first, low, high, STRIDE: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Pointers and mask of tile ``[BR, BC]`` of a matrix with ROWS rows of STRIDE elements, for columns in [low, high)."""
    rows = tl.arange(0, BR)
    columns = first + tl.arange(0, BC)
    inside = ((columns >= low) & (columns < high))[None, :]
    if ROWS % BR != 0:
        inside = inside & (rows < ROWS)[:, None]
    return base + (rows[:, None] * STRIDE + columns[None, :]), inside


@triton.jit
def load_square(base, STRIDE: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, S: tl.constexpr):
    """The first K columns of a matrix with ROWS rows of STRIDE elements, as a tile ``[BR, BK]``."""
    pointers, inside = map_tile(base, 0, 0, S.K, STRIDE, ROWS, BR, S.BK)
    if ROWS % BR == 0 and S.K % S.BK == 0:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def load_added(base, first, STRIDE: tl.constexpr, ROWS: tl.constexpr, BR: tl.constexpr, S: tl.constexpr):
    """Columns from ``first`` on of ``[0 | S]``, from ``[A | S]`` with A of K columns."""
    pointers, inside = map_tile(base, first, S.K, STRIDE, STRIDE, ROWS, BR, S.BN)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_map(base, tile, active, first, WIDTH: tl.constexpr, S: tl.constexpr):
    """Write a block of columns of a map ``[K, WIDTH]``."""
    pointers, inside = map_tile(base, first, 0, WIDTH, WIDTH, S.K, S.BK, S.BN)
    if active:
        if S.K % S.BK == 0 and WIDTH % S.BN == 0:
            tl.store(pointers, tile.to(base.dtype.element_ty))
        else:
            tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def identity_columns(first, S: tl.constexpr):
    """Columns from ``first`` on of ``[I | 0]``."""
    return tl.where(tl.arange(0, S.BK)[:, None] == (first + tl.arange(0, S.BN))[None, :], 1.0, 0.0)


@triton.jit
def decay_to_end(sums, size, plane, S: tl.constexpr):
    """Decay ``[C]`` from each token of a chunk of ``size`` tokens to its last one."""
    t = tl.arange(0, S.C)
    high, low = load_sum(sums, t, t < size, plane, S.EXACT)
    end_high, end_low = load_sum(sums, size - 1, size > 0, plane, S.EXACT)
    return decay_between(end_high, end_low, high, low, S.EXACT)


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride"])
def group_maps_kernel(
    k,
    units_in,  # tier 0: writes [rows, H, C, K+V]; above: maps [units, H, K, K+V]
    sums,
    entries,  # [rows, H, K, K+V]
    whole_maps,  # [groups, H, K, K+V], unless TOP
    prefixes,  # [4 groups, H, K, K+V], if STORE_PREFIXES
    table,
    T,
    N,
    NG,
    all_tokens,
    sums_stride,
    stride_k,
    S: tl.constexpr,
    TIER: tl.constexpr,
    TOP: tl.constexpr,
    STORE_PREFIXES: tl.constexpr,
):
    """Grid: groups x H x (prefix, pair) x blocks of columns, blocks fastest. float32: the map that is built, decays."""
    WIDTH: tl.constexpr = S.K + S.V
    BLOCKS: tl.constexpr = (WIDTH + S.BN - 1) // S.BN
    pid = tl.program_id(0)
    first = pid % BLOCKS * S.BN
    paired = pid // BLOCKS % 2
    h = pid // (2 * BLOCKS) % S.H
    group = pid // (2 * BLOCKS * S.H)
    start, length, unit0, units, row0, group0 = locate_group(group, table, T, N, NG, TIER, S)
    if length < 0:
        return
    first_unit = (group - group0) * GROUP
    here = tl.minimum(units - first_unit, GROUP)
    if paired == 0:
        steps = here
    else:
        steps = (here > FIRST_PAIRED + 1).to(tl.int32) * 2
    x = identity_columns(first, S)
    for i in range(steps):
        c = i + paired * FIRST_PAIRED
        local = first_unit + c
        unit = (unit0 + local).to(tl.int64) * S.H + h
        if STORE_PREFIXES:
            inside = (paired == 0) & (c > 2) & (c != 4)  # the other prefixes are [I | 0] or an entry
            place = prefix_slot(c, group).to(tl.int64) * S.H + h
            store_map(prefixes + place * (S.K * WIDTH), x, inside, first, WIDTH, S)
        low = x.to(units_in.dtype.element_ty)
        if TIER == 0:
            valid = tl.arange(0, S.C) < length - local * S.C
            origin = (start + local * S.C).to(tl.int64)
            base = units_in + unit * (S.C * WIDTH)
            added = load_added(base, first, WIDTH, S.C, S.C, S)
            k_tile = load_tile(k + origin * stride_k + h // (S.H // S.G) * S.K, stride_k, valid, S.C, S.K, S.BK, 0)
            head_sums = sums + h.to(tl.int64) * sums_stride + origin
            size = tl.minimum(length - local * S.C, S.C)
            to_end = decay_to_end(head_sums, size, all_tokens, S)
            decay = tl.exp2(tl.load(head_sums + size - 1))
            change = added.to(tl.float32) - memory_times(base, low, WIDTH, S.C, S.C, S)
            change = (change * to_end[:, None]).to(low.dtype)
            x = tl.dot(tl.trans(k_tile), change, x * decay, input_precision=S.PRECISION)
        else:
            base = units_in + unit * (S.K * WIDTH)
            added = load_added(base, first, WIDTH, S.K, S.BK, S)
            x = added.to(tl.float32) + memory_times(base, low, WIDTH, S.K, S.BK, S)
        is_entry = (paired == 1) | ((c & (c + 1)) == 0)
        # An entry of one unit has been written by the tier below, if it is one that a query reads as it is (see leaf.py).
        if TIER > 0 or not STORE_PREFIXES:
            is_entry = is_entry & (c % 2 == 1)
        # The next tier writes an entry of this group and others.
        closes_group = (c + 1 == GROUP) & ((group - group0) % 2 == 1)
        row = (row0 + ((local + 1) << (LOG_GROUP * TIER)) - 1).to(tl.int64) * S.H + h
        store_map(entries + row * (S.K * WIDTH), x, is_entry & (not closes_group), first, WIDTH, S)
    if not TOP:
        whole = group.to(tl.int64) * S.H + h
        store_map(whole_maps + whole * (S.K * WIDTH), x, (paired == 0) & (here == GROUP), first, WIDTH, S)
