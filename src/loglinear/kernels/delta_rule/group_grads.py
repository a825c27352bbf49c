"""GROUP GRADIENTS: from the gradient of a group's whole map and of its entries down to one gradient after each of its units.

If X is the gradient of a map after a unit (A, S), ``Aᵀ X`` is its gradient before the unit. So a program walks the units of its
group backwards, as group_maps walks them forwards, and adds an entry's own gradient where the map before it is an entry: that
is the *prefix*. The entries of the last one or two units, the *pairs*, come apart: only that of units 4 and 5 has a step.

Where the gradients stand (``grads``, a row for every second chunk, as entries of one have none, then SPARE more a group). The
row of the entry that ends with unit c of a group holds X of the prefix after c where that is an entry (c = 0, 1, 3, 7); else of
the pair (2, 4, 5, 6), and the prefix's X is in one of the group's own rows. Units are groups here; chunks have map_grads.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.common import GROUP
from loglinear.kernels.delta_rule.group_maps import locate_group, map_tile, store_map
from loglinear.kernels.delta_rule.products import transposed_times

SPARE = tl.constexpr(4)


@triton.jit
def is_prefix(c):
    """Whether the map after unit c of a group, from its first, is an entry of the tree."""
    return (c & (c + 1)) == 0


@triton.jit
def prefix_row(c, entry_row, spare_row):
    """Row of the gradient of the prefix after unit c; ``spare_row`` is the first of the group's own."""
    return tl.where(is_prefix(c), entry_row, spare_row + tl.maximum(c - 3, 0))


@triton.jit
def load_map_if(active, base, first, K: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):
    """A block of columns of a map ``[K, WIDTH]``, float32; zero if not active."""
    pointers, inside = map_tile(base, first, 0, tl.where(active, WIDTH, 0), WIDTH, K, BK, BN)
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "N", "NG", "spare"])
def group_grads_kernel(
    maps,  # [units, H, K, K+V] of the units
    map_grads,  # [groups, H, K, K+V] gradients of the groups' whole maps, unless TOP
    grads,  # [rows / 2 + spare rows, H, K, K+V]
    group_sequence,
    sequences,
    T,
    N,
    NG,
    spare,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    TIER: tl.constexpr,
    TOP: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: groups x H x blocks of columns, blocks fastest. float32: X. ``spare`` is the first spare row."""
    WIDTH: tl.constexpr = K + V
    SIZE: tl.constexpr = GROUP**TIER  # chunks of a unit
    BLOCKS: tl.constexpr = (WIDTH + BN - 1) // BN
    pid = tl.program_id(0)
    first = pid % BLOCKS * BN
    h = pid // BLOCKS % H
    group = pid // (BLOCKS * H)
    _, length, unit0, units, row0, group0 = locate_group(group, group_sequence, sequences, T, N, NG, C, TIER, PACKED)
    if length < 0:
        return
    first_unit = (group - group0) * GROUP
    here = tl.minimum(units - first_unit, GROUP)
    if here > 5:
        local = first_unit + 5
        row = row0 + (local + 1) * SIZE - 1
        pair = grads + ((row // 2).to(tl.int64) * H + h) * (K * WIDTH)
        unit = (unit0 + local).to(tl.int64) * HEADS + h
        both = load_map_if(here > 5, pair, first, K, WIDTH, BK, BN)
        both = transposed_times(maps + unit * (K * WIDTH), both.to(maps.dtype.element_ty), WIDTH, K, BK, BN, PRECISION)
        single = grads + (((row - SIZE) // 2).to(tl.int64) * H + h) * (K * WIDTH)
        both += load_map_if(here > 5, single, first, K, WIDTH, BK, BN)
        store_map(single, both, True, first, K, WIDTH, BK, BN)
    if TOP:
        x = tl.zeros([BK, BN], tl.float32)
    else:
        # Nothing reads a map that ends with a group that is not whole.
        x = load_map_if(here == GROUP, map_grads + (group.to(tl.int64) * H + h) * (K * WIDTH), first, K, WIDTH, BK, BN)
    for i in range(here - 1):
        c = here - 1 - i
        local = first_unit + c
        row = row0 + (local + 1) * SIZE - 1
        own = grads + ((row // 2).to(tl.int64) * H + h) * (K * WIDTH)
        entry = load_map_if(is_prefix(c) & (c + 1 < GROUP), own, first, K, WIDTH, BK, BN)
        x += entry
        target = grads + (prefix_row(c, row // 2, spare + group * SPARE).to(tl.int64) * H + h) * (K * WIDTH)
        store_map(target, x, True, first, K, WIDTH, BK, BN)
        unit = (unit0 + local).to(tl.int64) * HEADS + h
        x = transposed_times(maps + unit * (K * WIDTH), x.to(maps.dtype.element_ty), WIDTH, K, BK, BN, PRECISION)
    if here > 0:
        row = row0 + (first_unit + 1) * SIZE - 1
        own = grads + ((row // 2).to(tl.int64) * H + h) * (K * WIDTH)
        x += load_map_if(here > 0, own, first, K, WIDTH, BK, BN)
        store_map(own, x, True, first, K, WIDTH, BK, BN)
