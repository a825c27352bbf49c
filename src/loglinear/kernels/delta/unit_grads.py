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
def transition_grads(prefixes, entries, grads, c, group, row, x_row, h, first_k, first_n, H: tl.constexpr,
                     HEADS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, BK: tl.constexpr,
                     BN: tl.constexpr, BW: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Tile ``[BK, BN]`` of dA of unit c of a group, whose prefix's gradient is in ``x_row``; entries have SIZE rows a unit."""
    own = grads + (row.to(tl.int64) * H + h) * (K * WIDTH)
    # Units 2, 4 and 6 are a pair's first, as unit 0 is the prefix's: what is before them is [I | 0].
    total = load_part_if(c % 2 == 0, own, first_k, first_n, K, K, WIDTH, BK, BN).to(tl.float32)
    x = grads + (x_row.to(tl.int64) * H + h) * (K * WIDTH)
    before_x = prefixes + (prefix_slot(c, group).to(tl.int64) * HEADS + h) * (K * WIDTH)
    # The prefix before units 1, 2 and 4 is an entry, as is the pair's first unit before unit 5.
    other = tl.where(c == 5, own, x)
    before_other = entries + ((row - SIZE).to(tl.int64) * HEADS + h) * (K * WIDTH)
    blocks = (WIDTH + BW - 1) // BW
    after_entry = (0b110110 >> c) & 1
    after_prefix = (0b11101000 >> c) & 1
    for i in range(blocks * (1 - after_entry), blocks * (1 + after_prefix)):
        is_other = i < blocks
        first = tl.where(is_other, i, i - blocks) * BW
        left = load_part(tl.where(is_other, other, x), first_k, first, WIDTH, K, WIDTH, BK, BW)
        right = load_part(tl.where(is_other, before_other, before_x), first_n, first, WIDTH, K, WIDTH, BN, BW)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@triton.jit
def state_grads(grads, c, row, x_row, h, first_k, first_n, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                BK: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Tile ``[BK, BN]`` of dS of unit c of a group. float32."""
    WIDTH: tl.constexpr = K + V
    x = grads + (x_row.to(tl.int64) * H + h) * (K * WIDTH) + K
    own = grads + (row.to(tl.int64) * H + h) * (K * WIDTH) + K
    total = load_part(x, first_k, first_n, V, K, WIDTH, BK, BN).to(tl.float32)
    if is_prefix(c) == 0:
        total += load_part(own, first_k, first_n, V, K, WIDTH, BK, BN).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["T", "N", "NG", "spare"])
def unit_grads_kernel(
    prefixes,  # [4 groups, H, K, K+V]
    entries,  # [rows, H, K, K+V]
    grads,  # [rows + spare rows, H, K, K+V], as group_grads leaves them
    map_grads,  # [units, H, K, K+V]
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
    BW: tl.constexpr,
    TIER: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: groups x GROUP x H x tiles of [K, K+V], tiles fastest. float32: accumulator."""
    WIDTH: tl.constexpr = K + V
    SIZE: tl.constexpr = GROUP**TIER  # chunks of a unit
    TILES_A: tl.constexpr = (K + BN - 1) // BN
    TILES_N: tl.constexpr = TILES_A + (V + BN - 1) // BN
    TILES: tl.constexpr = (K + BK - 1) // BK * TILES_N
    pid = tl.program_id(0)
    tile_n = pid % TILES_N
    first_k = pid % TILES // TILES_N * BK
    h = pid // TILES % H
    c = pid // (TILES * H) % GROUP
    group = pid // (TILES * H * GROUP)
    _, length, unit0, units, row0, group0 = locate_group(group, group_sequence, sequences, T, N, NG, C, TIER, PACKED)
    local = (group - group0) * GROUP + c
    if (length < 0) | (local >= units):
        return
    row = row0 + (local + 1) * SIZE - 1
    x_row = prefix_row(c, row, spare + group * SPARE)
    unit = (unit0 + local).to(tl.int64) * H + h
    target = map_grads + unit * (K * WIDTH)
    if tile_n < TILES_A:
        first_n = tile_n * BN
        total = transition_grads(prefixes, entries, grads, c, group, row, x_row, h, first_k, first_n, H, HEADS, K, WIDTH, SIZE,
                                 BK, BN, BW, PRECISION)  # fmt: skip
        store_part(target, total, first_k, first_n, K, K, WIDTH, BK, BN)
    else:
        first_n = (tile_n - TILES_A) * BN
        total = state_grads(grads, c, row, x_row, h, first_k, first_n, H, K, V, BK, BN)
        store_part(target + K, total, first_k, first_n, V, K, WIDTH, BK, BN)
