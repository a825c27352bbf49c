"""OCTET MAPS: the entries inside every octet of units, and the map of the whole octet, one tier of the tree at a time.

A map ``[A | S]`` is applied to another as to any state, ``X <- A X + [0 | S]``, and columns of X do not meet: a program
owns a block of columns of one octet's maps and walks the octet's units. Some programs keep the *prefix* of the octet,
which is the entry after 1, 2, 4 and 8 units. The other programs keep the *pair* of units 4 and 5, which is the entry
after 6. The units of tier 0 are chunks. The map of a chunk is applied as two thin products and never formed. The entry
of a single chunk is written only for the backward, which needs the entries of units 0 and 4. The units of a higher tier
are the octets of the tier below. So the longest chain has eight units a tier, and no program walks a sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from loglinear.fenwick import lowbit, query_path
from loglinear.kernels.delta.leaf import of_rows, whole_decay
from loglinear.kernels.delta.products import memory_times
from loglinear.kernels.tree.decays import to_end
from loglinear.kernels.tree.place import LOG_OCTET, OCTET, bit, locate
from loglinear.kernels.tree.tiles import load_block, load_tile, store_part_if


def is_entry(c: int) -> bool:
    """Whether the first c units of an octet are one entry of the tree."""
    return len(list(query_path(c))) == 1


def closes_pair(c: int) -> bool:
    """Whether unit c of an octet, from 0, ends an entry of several units that does not begin with the octet."""
    return 1 < lowbit(c + 1) < c + 1


PAIRS = [c for c in range(OCTET.value) if closes_pair(c)]
FIRST_PAIRED = tl.constexpr(PAIRS[0] - 1)  # this unit and the next are a pair that is an entry
# A bit for each unit of an octet. AFTER_ENTRY: the prefix before it is an entry, or the pair's first unit is. AFTER_PREFIX: the
# prefix before it is neither [I | 0] nor an entry.
AFTER_ENTRY = tl.constexpr(sum(1 << c for c in range(1, OCTET.value) if is_entry(c) or c in PAIRS))
AFTER_PREFIX = tl.constexpr(sum(1 << c for c in range(1, OCTET.value) if not is_entry(c)))
PREFIXES = tl.constexpr(AFTER_PREFIX.value.bit_count())  # prefixes of an octet that are kept: those of AFTER_PREFIX


class Group(NamedTuple):
    """Where an octet of units lies: first token and tokens of its sequence, -1 past the last octet; first unit and first
    chunk of the sequence; the octet's first unit in the sequence, and how many whole units it has.

    Tokens are known in tier 0 only. All chunks count as whole.
    """

    start: Any
    length: Any
    unit0: Any
    chunk0: Any
    first: Any
    here: Any


class Units(NamedTuple):
    """The units of a tier as one head sees them: maps, in tier 0 the writes of chunks; and in tier 0 keys with the distance of
    two tokens, sums and the distance of their planes, log-decays.
    """

    maps: Any
    keys: Any
    stride: Any
    sums: Any
    plane: Any
    logs: Any


@triton.jit
def locate_octet(octet, table, T, N, NG, TIER: tl.constexpr, S: tl.constexpr):
    """The ``Octet``."""
    at = locate(octet, table, T, N, NG, NG, S.PACKED)
    if TIER == 0:
        unit0 = at.chunk0
        units = (at.length + S.C - 1) // S.C
    else:
        unit0 = at.start
        units = (at.length if S.PACKED else N) >> (LOG_OCTET * TIER)
    first = (octet - at.octet0) * OCTET
    return Group(at.start, at.length, unit0, at.chunk0, first, tl.minimum(units - first, OCTET)), octet - at.octet0


@triton.jit
def prefix_slot(c, octet):
    """The index of the prefix before unit c of an octet, if it is one of the PREFIXES: before units 3, 5, 6 and 7 of 8."""
    return octet * PREFIXES + tl.maximum(c - OCTET // 2, 0)


@triton.jit
def load_added(base, first, ROWS: tl.constexpr, BR: tl.constexpr, S: tl.constexpr):
    """Columns from ``first`` on of ``[0 | S]``, from ``[A | S]`` with A of K columns."""
    return load_block(base, S.K + S.V, 0, first, S.K, S.K + S.V, ROWS, BR, S.BN, True)


@triton.jit
def store_map(maps, site, tile, active, first, S: tl.constexpr):
    """Write a block of columns of map ``unit`` (int64) of ``maps [units, K, K+V]``, if active."""
    base = maps + site * (S.K * (S.K + S.V))
    store_part_if(active, base, S.K + S.V, tile, 0, first, S.K, S.K + S.V, S.BK, S.BN)


@triton.jit
def identity(first, S: tl.constexpr):
    """Columns from ``first`` on of ``[I | 0]``."""
    return tl.where(tl.arange(0, S.BK)[:, None] == (first + tl.arange(0, S.BN))[None, :], 1.0, 0.0)


@triton.jit
def compose(x, units, site, at, local, first, TIER: tl.constexpr, S: tl.constexpr):
    """``A X + [0 | S]`` for the map of a unit, in tier 0 as ``γ X + K_endᵀ ([0 | U] - W X)``; columns from ``first`` on."""
    low = x.to(units.maps.dtype.element_ty)
    if TIER == 0:
        size = tl.minimum(at.length - local * S.C, S.C)
        origin = (at.start + local * S.C).to(tl.int64)
        base = units.maps + site * (S.C * (S.K + S.V))
        added = load_added(base, first, S.C, S.C, S)
        valid = tl.arange(0, S.C) < at.length - local * S.C
        k_tile = load_tile(units.keys + origin * units.stride, units.stride, valid, S.C, S.K, S.BK, 0)
        head_sums = units.sums + origin
        decay = of_rows(whole_decay(head_sums, size - 1, units.logs, site, S), S)
        change = added.to(tl.float32) - memory_times(base, low, S.K + S.V, S.C, S.C, S)
        change = (change * to_end(head_sums, size, units.plane, S)[:, None]).to(low.dtype)
        x = tl.dot(tl.trans(k_tile), change, x * decay, input_precision=S.PRECISION)
    else:
        base = units.maps + site * (S.K * (S.K + S.V))
        added = load_added(base, first, S.K, S.BK, S)
        x = added.to(tl.float32) + memory_times(base, low, S.K + S.V, S.K, S.BK, S)
    return x


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride"])
def octet_maps_kernel(
    k,
    units_in,  # tier 0: writes [chunks, H, C, K+V]; above: maps [units, H, K, K+V]
    sums,
    chunk_log,
    entries,  # [chunks, H, K, K+V]
    whole_maps,  # [octets, H, K, K+V], unless TOP
    prefixes,  # [4 octets, H, K, K+V], if STORE_PREFIXES
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
    """Grid: octets x H x (prefix, pair) x blocks of columns, blocks fastest. float32: the map that is built, decays."""
    BLOCKS: tl.constexpr = (S.K + S.V + S.BN - 1) // S.BN
    pid = tl.program_id(0)
    first = pid % BLOCKS * S.BN
    paired = pid // BLOCKS % 2
    h = pid // (2 * BLOCKS) % S.H
    octet = pid // (2 * BLOCKS * S.H)
    at, number = locate_octet(octet, table, T, N, NG, TIER, S)
    if at.length < 0:
        return
    if paired == 0:
        steps = at.here
    else:
        steps = (at.here > FIRST_PAIRED + 1).to(tl.int32) * 2
    head = h // (S.H // S.G) * S.K
    units = Units(units_in, k + head, stride_k, sums + h.to(tl.int64) * sums_stride, all_tokens, chunk_log)
    x = identity(first, S)
    for i in range(steps):
        c = i + paired * FIRST_PAIRED
        local = at.first + c
        if STORE_PREFIXES:
            kept = (paired == 0) & (bit(AFTER_PREFIX, c) == 1)
            store_map(prefixes, prefix_slot(c, octet).to(tl.int64) * S.H + h, x, kept, first, S)
        x = compose(x, units, (at.unit0 + local).to(tl.int64) * S.H + h, at, local, first, TIER, S)
        stored = (paired == 1) | ((c & (c + 1)) == 0)
        # An entry of one unit has been written by the tier below, if it is one that a query reads as it is (see leaf.py).
        if TIER > 0 or not STORE_PREFIXES:
            stored = stored & (c % 2 == 1)
        # The next tier writes an entry of this octet and others.
        closes_octet = (c + 1 == OCTET) & (number % 2 == 1)
        target = (at.chunk0 + ((local + 1) << (LOG_OCTET * TIER)) - 1).to(tl.int64) * S.H + h
        store_map(entries, target, x, stored & (not closes_octet), first, S)
    if not TOP:
        whole = octet.to(tl.int64) * S.H + h
        store_map(whole_maps, whole, x, (paired == 0) & (at.here == OCTET), first, S)
