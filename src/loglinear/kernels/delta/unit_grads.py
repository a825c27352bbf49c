"""UNIT GRADIENTS: the gradient ``[dA | dS]`` of every unit's own map, from the gradients X of the maps that it closes.

The prefix after a unit (A, S) is ``A Y + [0 | S]`` with Y the prefix before it, so ``dA = X Yᵀ`` over all K + V
columns, and dS is X's last V columns. Units 2, 4, 5 and 6 of an octet close a pair too: alone, where Y is ``[I | 0]``,
or unit 5 after unit 4. The kernel is for units that are octets. The units of tier 0 are chunks, and map_grads needs no
dA of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from loglinear.kernels.delta.entry_grads import map_tile_of_program
from loglinear.kernels.delta.octet_grads import SPARE, is_prefix, prefix_row
from loglinear.kernels.delta.octet_maps import AFTER_ENTRY, AFTER_PREFIX, FIRST_PAIRED, locate_octet, prefix_slot
from loglinear.kernels.tree.place import OCTET, bit
from loglinear.kernels.tree.tiles import load_block, load_part, store_part


class Unit(NamedTuple):
    """Unit c of an octet, of one head: the maps before it, a prefix and an entry; and X of the prefix and of the entry that it
    closes, ``own``. All ``[K, K+V]``.
    """

    c: Any
    prefix: Any
    entry: Any
    x: Any
    own: Any


@triton.jit
def unit_of(prefixes, entries, grads, c, octet, chunk, size, spare, h, S: tl.constexpr):
    """The ``Unit`` that ends in a row; units have ``size`` rows, and ``spare`` is the first spare row."""
    MAP: tl.constexpr = S.K * (S.K + S.V)
    x = grads + (prefix_row(c, chunk, spare + octet * SPARE).to(tl.int64) * S.H + h) * MAP
    own = grads + (chunk.to(tl.int64) * S.H + h) * MAP
    prefix = prefixes + (prefix_slot(c, octet).to(tl.int64) * S.HEADS + h) * MAP
    entry = entries + ((chunk - size).to(tl.int64) * S.HEADS + h) * MAP
    return Unit(c, prefix, entry, x, own)


@triton.jit
def blocks_before(u, blocks):
    """(first, end) of the blocks of columns that ``block_before`` takes: those after an entry, then those after a prefix."""
    return blocks * (1 - bit(AFTER_ENTRY, u.c)), blocks * (1 + bit(AFTER_PREFIX, u.c))


@triton.jit
def map_before(u, i, blocks, BW: tl.constexpr):
    """X, the map before it, Y, and the first column of block i, of BW columns."""
    other = i < blocks
    left = tl.where(other, tl.where(u.c == FIRST_PAIRED + 1, u.own, u.x), u.x)
    return left, tl.where(other, u.entry, u.prefix), tl.where(other, i, i - blocks) * BW


@triton.jit
def block_before(u, i, blocks, first_k, first_n, BN: tl.constexpr, BW: tl.constexpr, S: tl.constexpr):
    """Block i, of BW columns, of X (BK rows from ``first_k`` on) and of the map before it, Y (BN rows from ``first_n`` on)."""
    left, right, first = map_before(u, i, blocks, BW)
    x = load_part(left, S.K + S.V, first_k, first, S.K, S.K + S.V, S.BK, BW)
    return x, load_part(right, S.K + S.V, first_n, first, S.K, S.K + S.V, BN, BW)


@triton.jit
def transition_grads(u, first_k, first_n, BW: tl.constexpr, S: tl.constexpr):
    """Tile ``[BK, BN]`` of dA of a unit."""
    # Units 2, 4 and 6 are a pair's first, as unit 0 is the prefix's: what is before them is [I | 0].
    end = tl.where(u.c % 2 == 0, S.K, 0)
    total = load_block(u.own, S.K + S.V, first_k, first_n, 0, end, S.K, S.BK, S.BN, True).to(tl.float32)
    blocks = (S.K + S.V + BW - 1) // BW
    begin, end = blocks_before(u, blocks)
    for i in range(begin, end):
        x, y = block_before(u, i, blocks, first_k, first_n, S.BN, BW, S)
        total = tl.dot(x, tl.trans(y), total, input_precision=S.PRECISION)
    return total


@triton.jit
def state_grads(u, first_k, first_n, BN: tl.constexpr, S: tl.constexpr):
    """Tile ``[BK, BN]`` of dS of a unit. float32."""
    total = load_part(u.x + S.K, S.K + S.V, first_k, first_n, S.K, S.V, S.BK, BN).to(tl.float32)
    if is_prefix(u.c) == 0:
        total += load_part(u.own + S.K, S.K + S.V, first_k, first_n, S.K, S.V, S.BK, BN).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["T", "N", "NG", "spare"])
def unit_grads_kernel(
    prefixes, entries, grads, map_grads, table, T, N, NG, spare, S: tl.constexpr, BW: tl.constexpr, TIER: tl.constexpr
):
    """``map_grads [units, H, K, K+V]``, from ``grads`` as octet_grads leaves them.

    Grid: octets x OCTET x H x tiles of [K, K+V], tiles fastest. float32: accumulator.
    """
    SIZE: tl.constexpr = OCTET**TIER  # chunks of a unit
    first_k, first_n, in_state, h, rest = map_tile_of_program(S)
    c = rest % OCTET
    octet = rest // OCTET
    at, _ = locate_octet(octet, table, T, N, NG, TIER, S)
    if (at.length < 0) | (c >= at.here):
        return
    local = at.first + c
    u = unit_of(prefixes, entries, grads, c, octet, at.chunk0 + (local + 1) * SIZE - 1, SIZE, spare, h, S)
    target = map_grads + ((at.unit0 + local).to(tl.int64) * S.H + h) * (S.K * (S.K + S.V))
    if in_state:
        total = state_grads(u, first_k, first_n, S.BN, S)
        store_part(target + S.K, S.K + S.V, total, first_k, first_n, S.K, S.V, S.BK, S.BN)
    else:
        total = transition_grads(u, first_k, first_n, BW, S)
        store_part(target, S.K + S.V, total, first_k, first_n, S.K, S.K, S.BK, S.BN)
