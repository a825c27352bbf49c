"""UNIT GRADIENTS: the gradient ``[dA | dS]`` of every unit's own map, from the gradients X of the maps that it closes.

The prefix after a unit (A, S) is ``A Y + [0 | S]`` with Y the prefix before it, so ``dA = X Yᵀ`` over all K + V columns, and dS
is X's last V columns. Units 2, 4, 5 and 6 of a group close a pair too: alone, where Y is ``[I | 0]``, or unit 5 after unit 4.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.common import GROUP
from loglinear.kernels.delta_rule.group_grads import SPARE, is_prefix, prefix_row
from loglinear.kernels.delta_rule.group_maps import locate_group
from loglinear.kernels.delta_rule.tiles import load_part, load_part_if, store_part


@triton.jit
def outer_product(total, x, y, count, first_k, first_n, K: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr,
                  BN: tl.constexpr, BW: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add tile ``[BK, BN]`` of ``X Yᵀ``, over the first ``count`` blocks of BW columns of both."""
    for i in range(count):
        left = load_part(x, first_k, i * BW, WIDTH, K, WIDTH, BK, BW)
        right = load_part(y, first_n, i * BW, WIDTH, K, WIDTH, BN, BW)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["T", "N", "NG", "spare"])
def unit_grads_kernel(
    prefixes,  # [units, H, K, K+V], read for units 3, 5, 6 and 7 of a group
    entries,  # [rows, H, K, K+V]
    grads,  # [rows + spare rows, H, K, K+V], as group_grads leaves them
    map_grads,  # [units, H, K, K+V], or [units, H, K, K] in tier 0, which leaves dS where it is
    group_sequence,
    sequences,
    T,
    N,
    NG,
    spare,
    H: tl.constexpr,
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
    """Grid: groups x GROUP x H x tiles of [K, K] (above tier 0 of [K, K+V]), tiles fastest. float32: accumulator."""
    WIDTH: tl.constexpr = K + V
    SIZE: tl.constexpr = GROUP**TIER  # chunks of a unit
    OUT: tl.constexpr = K if TIER == 0 else WIDTH
    TILES_A: tl.constexpr = (K + BN - 1) // BN
    TILES_N: tl.constexpr = TILES_A + ((V + BN - 1) // BN if TIER > 0 else 0)
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
    own = grads + (row.to(tl.int64) * H + h) * (K * WIDTH)
    x_row = prefix_row(c, row, spare + group * SPARE)
    x = grads + (x_row.to(tl.int64) * H + h) * (K * WIDTH)
    unit = (unit0 + local).to(tl.int64) * H + h
    target = map_grads + unit * (K * OUT)
    if tile_n < TILES_A:
        first_n = tile_n * BN
        # Units 2, 4 and 6 are a pair's first, as unit 0 is the prefix's: what is before them is [I | 0].
        total = load_part_if(c % 2 == 0, own, first_k, first_n, K, K, WIDTH, BK, BN).to(tl.float32)
        blocks = (WIDTH + BW - 1) // BW
        # The prefix before units 1, 2 and 4 is an entry, as is the pair's first unit before unit 5.
        after_entry = (0b110110 >> c) & 1
        after_prefix = (0b11101000 >> c) & 1
        before = entries + ((row - SIZE).to(tl.int64) * H + h) * (K * WIDTH)
        left = tl.where(c == 5, row, x_row).to(tl.int64)
        left = grads + (left * H + h) * (K * WIDTH)
        total = outer_product(
            total, left, before, blocks * after_entry, first_k, first_n, K, WIDTH, BK, BN, BW, PRECISION
        )
        before = prefixes + unit * (K * WIDTH)
        total = outer_product(
            total, x, before, blocks * after_prefix, first_k, first_n, K, WIDTH, BK, BN, BW, PRECISION
        )
        store_part(target, total, first_k, first_n, K, K, OUT, BK, BN)
    else:
        first_n = (tile_n - TILES_A) * BN
        total = load_part(x + K, first_k, first_n, V, K, WIDTH, BK, BN).to(tl.float32)
        total += load_part_if(is_prefix(c) == 0, own + K, first_k, first_n, V, K, WIDTH, BK, BN).to(tl.float32)
        store_part(target + K, total, first_k, first_n, V, K, OUT, BK, BN)
