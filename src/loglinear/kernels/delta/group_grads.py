"""GROUP GRADIENTS: the gradient of the map after each unit of a group, from the gradients of its whole map and its entries.

If X is the gradient of a map after a unit (A, S), ``Aᵀ X`` is its gradient before the unit. So a program walks the
units of its group backwards, as group_maps walks them forwards, and adds an entry's own gradient where the map before
it is an entry: this is the *prefix*. The entries of the last one or two units, the *pairs*, are separate: only the pair
of units 4 and 5 has a step.

Where the gradients stand (``grads``, a row for each entry, then SPARE more for each group). The row of the entry that ends with
unit c of a group holds X of the prefix after c if this prefix is an entry (c = 0, 1, 3, 7). Otherwise it holds X of the pair
(c = 2, 4, 5, 6), and X of the prefix is in one of the group's own rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.delta.group_maps import decay_to_end, load_square, locate_group, map_tile, store_map
from loglinear.kernels.delta.products import tokens_times, transposed_times
from loglinear.kernels.tree.place import GROUP

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
def load_map_if(active, base, first, WIDTH: tl.constexpr, S: tl.constexpr):
    """A block of columns of a map ``[K, WIDTH]``, float32; zero if not active."""
    pointers, inside = map_tile(base, first, 0, tl.where(active, WIDTH, 0), WIDTH, S.K, S.BK, S.BN)
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def pull_back(
    x,
    maps,
    k_head,
    sums,
    chunk_log,
    unit,
    local,
    start,
    length,
    plane,
    stride_k,
    WIDTH: tl.constexpr,
    TIER: tl.constexpr,
    S: tl.constexpr,
):
    """``Aᵀ X`` for the transition A of a unit, in tier 0 as ``γ X - Wᵀ (K_end X)``."""
    low = x.to(maps.dtype.element_ty)
    if TIER == 0:
        valid = tl.arange(0, S.C) < length - local * S.C
        origin = (start + local * S.C).to(tl.int64)
        change = tokens_times(k_head + origin * stride_k, stride_k, valid, low, S.BN, S)
        to_end = decay_to_end(sums + origin, tl.minimum(length - local * S.C, S.C), plane, S)
        erased = load_square(maps + unit * (S.C * WIDTH), WIDTH, S.C, S.C, S)
        x = x * tl.exp2(tl.load(chunk_log + unit))
        x = tl.dot(tl.trans(erased), (change * -to_end[:, None]).to(low.dtype), x, input_precision=S.PRECISION)
    else:
        x = transposed_times(maps + unit * (S.K * WIDTH), low, WIDTH, S)
    return x


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "spare"])
def group_grads_kernel(
    k,
    maps,  # tier 0: writes [rows, H, C, K+V]; above: maps of the units [units, H, K, K+V]
    sums,
    chunk_log,
    map_grads,  # [groups, H, K, K+V] gradients of the groups' whole maps, unless TOP
    grads,  # [rows + spare rows, H, K, K+V]
    table,
    T,
    N,
    NG,
    all_tokens,
    sums_stride,
    stride_k,
    spare,
    S: tl.constexpr,
    TIER: tl.constexpr,
    TOP: tl.constexpr,
):
    """Grid: groups x H x blocks of columns, blocks fastest. float32: X, decays. ``spare`` is the first spare row."""
    WIDTH: tl.constexpr = S.K + S.V
    SIZE: tl.constexpr = GROUP**TIER  # chunks of a unit
    BLOCKS: tl.constexpr = (WIDTH + S.BN - 1) // S.BN
    pid = tl.program_id(0)
    first = pid % BLOCKS * S.BN
    h = pid // BLOCKS % S.H
    group = pid // (BLOCKS * S.H)
    start, length, unit0, units, row0, group0 = locate_group(group, table, T, N, NG, TIER, S)
    if length < 0:
        return
    first_unit = (group - group0) * GROUP
    here = tl.minimum(units - first_unit, GROUP)
    k_head = k + h // (S.H // S.G) * S.K
    head_sums = sums + h.to(tl.int64) * sums_stride
    if here > 5:
        local = first_unit + 5
        row = row0 + (local + 1) * SIZE - 1
        pair = grads + (row.to(tl.int64) * S.H + h) * (S.K * WIDTH)
        unit = (unit0 + local).to(tl.int64) * S.HEADS + h
        both = load_map_if(here > 5, pair, first, WIDTH, S)
        both = pull_back(
            both, maps, k_head, head_sums, chunk_log, unit, local, start, length, all_tokens, stride_k, WIDTH, TIER, S
        )
        single = grads + ((row - SIZE).to(tl.int64) * S.H + h) * (S.K * WIDTH)
        both += load_map_if(here > 5, single, first, WIDTH, S)
        store_map(single, both, True, first, WIDTH, S)
    if TOP:
        x = tl.zeros([S.BK, S.BN], tl.float32)
    else:
        # Nothing reads a map that ends with a group that is not whole.
        x = load_map_if(here == GROUP, map_grads + (group.to(tl.int64) * S.H + h) * (S.K * WIDTH), first, WIDTH, S)
    for i in range(here - 1):
        c = here - 1 - i
        local = first_unit + c
        row = row0 + (local + 1) * SIZE - 1
        own = grads + (row.to(tl.int64) * S.H + h) * (S.K * WIDTH)
        entry = load_map_if(is_prefix(c) & (c + 1 < GROUP), own, first, WIDTH, S)
        x += entry
        target = grads + (prefix_row(c, row, spare + group * SPARE).to(tl.int64) * S.H + h) * (S.K * WIDTH)
        store_map(target, x, True, first, WIDTH, S)
        unit = (unit0 + local).to(tl.int64) * S.HEADS + h
        x = pull_back(
            x, maps, k_head, head_sums, chunk_log, unit, local, start, length, all_tokens, stride_k, WIDTH, TIER, S
        )
    if here > 0:
        row = row0 + (first_unit + 1) * SIZE - 1
        own = grads + (row.to(tl.int64) * S.H + h) * (S.K * WIDTH)
        x += load_map_if(here > 0, own, first, WIDTH, S)
        store_map(own, x, True, first, WIDTH, S)
