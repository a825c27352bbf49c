"""UNIT GRADIENTS: the gradient ``[dA | dS]`` of every unit's own map, from the gradients X of the maps that it closes.

The prefix after a unit (A, S) is ``A Y + [0 | S]`` with Y the prefix before it, so ``dA = X Yᵀ`` over all K + V
columns, and dS is X's last V columns. Units 2, 4, 5 and 6 of a group close a pair too: alone, where Y is ``[I | 0]``,
or unit 5 after unit 4. The kernel is for units that are groups. The units of tier 0 are chunks, and map_grads needs no
dA of a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.delta.group_grads import SPARE, is_prefix, prefix_row
from loglinear.kernels.delta.group_maps import locate_group, prefix_slot
from loglinear.kernels.delta.tiles import load_part, load_part_if, store_part
from loglinear.kernels.tree.place import GROUP


@triton.jit
def transition_grads(
    prefixes,
    entries,
    grads,
    c,
    group,
    row,
    x_row,
    h,
    first_k,
    first_n,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    BW: tl.constexpr,
    S: tl.constexpr,
):
    """Tile ``[BK, BN]`` of dA of unit c of a group, whose prefix's gradient is in ``x_row``; entries have SIZE rows a unit."""
    own = grads + (row.to(tl.int64) * S.H + h) * (S.K * WIDTH)
    # Units 2, 4 and 6 are a pair's first, as unit 0 is the prefix's: what is before them is [I | 0].
    total = load_part_if(c % 2 == 0, own, first_k, first_n, S.K, S.K, WIDTH, S.BK, S.BN).to(tl.float32)
    x = grads + (x_row.to(tl.int64) * S.H + h) * (S.K * WIDTH)
    before_x = prefixes + (prefix_slot(c, group).to(tl.int64) * S.HEADS + h) * (S.K * WIDTH)
    # The prefix before units 1, 2 and 4 is an entry, as is the pair's first unit before unit 5.
    other = tl.where(c == 5, own, x)
    before_other = entries + ((row - SIZE).to(tl.int64) * S.HEADS + h) * (S.K * WIDTH)
    blocks = (WIDTH + BW - 1) // BW
    after_entry = (0b110110 >> c) & 1
    after_prefix = (0b11101000 >> c) & 1
    for i in range(blocks * (1 - after_entry), blocks * (1 + after_prefix)):
        is_other = i < blocks
        first = tl.where(is_other, i, i - blocks) * BW
        left = load_part(tl.where(is_other, other, x), first_k, first, WIDTH, S.K, WIDTH, S.BK, BW)
        right = load_part(tl.where(is_other, before_other, before_x), first_n, first, WIDTH, S.K, WIDTH, S.BN, BW)
        total = tl.dot(left, tl.trans(right), total, input_precision=S.PRECISION)
    return total


@triton.jit
def state_grads(grads, c, row, x_row, h, first_k, first_n, BN: tl.constexpr, S: tl.constexpr):
    """Tile ``[BK, BN]`` of dS of unit c of a group. float32."""
    WIDTH: tl.constexpr = S.K + S.V
    x = grads + (x_row.to(tl.int64) * S.H + h) * (S.K * WIDTH) + S.K
    own = grads + (row.to(tl.int64) * S.H + h) * (S.K * WIDTH) + S.K
    total = load_part(x, first_k, first_n, S.V, S.K, WIDTH, S.BK, BN).to(tl.float32)
    if is_prefix(c) == 0:
        total += load_part(own, first_k, first_n, S.V, S.K, WIDTH, S.BK, BN).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["T", "N", "NG", "spare"])
def unit_grads_kernel(
    prefixes,  # [4 groups, H, K, K+V]
    entries,  # [rows, H, K, K+V]
    grads,  # [rows + spare rows, H, K, K+V], as group_grads leaves them
    map_grads,  # [units, H, K, K+V]
    table,
    T,
    N,
    NG,
    spare,
    S: tl.constexpr,
    BW: tl.constexpr,
    TIER: tl.constexpr,
):
    """Grid: groups x GROUP x H x tiles of [K, K+V], tiles fastest. float32: accumulator."""
    WIDTH: tl.constexpr = S.K + S.V
    SIZE: tl.constexpr = GROUP**TIER  # chunks of a unit
    TILES_A: tl.constexpr = (S.K + S.BN - 1) // S.BN
    TILES_N: tl.constexpr = TILES_A + (S.V + S.BN - 1) // S.BN
    TILES: tl.constexpr = (S.K + S.BK - 1) // S.BK * TILES_N
    pid = tl.program_id(0)
    tile_n = pid % TILES_N
    first_k = pid % TILES // TILES_N * S.BK
    h = pid // TILES % S.H
    c = pid // (TILES * S.H) % GROUP
    group = pid // (TILES * S.H * GROUP)
    _, length, unit0, units, row0, group0 = locate_group(group, table, T, N, NG, TIER, S)
    local = (group - group0) * GROUP + c
    if (length < 0) | (local >= units):
        return
    row = row0 + (local + 1) * SIZE - 1
    x_row = prefix_row(c, row, spare + group * SPARE)
    unit = (unit0 + local).to(tl.int64) * S.H + h
    target = map_grads + unit * (S.K * WIDTH)
    if tile_n < TILES_A:
        first_n = tile_n * S.BN
        total = transition_grads(
            prefixes, entries, grads, c, group, row, x_row, h, first_k, first_n, WIDTH, SIZE, BW, S
        )
        store_part(target, total, first_k, first_n, S.K, S.K, WIDTH, S.BK, S.BN)
    else:
        first_n = (tile_n - TILES_A) * S.BN
        total = state_grads(grads, c, row, x_row, h, first_k, first_n, S.BN, S)
        store_part(target + S.K, total, first_k, first_n, S.V, S.K, WIDTH, S.BK, S.BN)
