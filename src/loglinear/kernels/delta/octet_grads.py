"""OCTET GRADIENTS: the gradient of the map after each unit of an octet, from the gradients of its whole map and its entries.

If X is the gradient of a map after a unit (A, S), ``Aᵀ X`` is its gradient before the unit. So a program walks the
units of its octet backwards, as octet_maps walks them forwards, and adds an entry's own gradient where the map before
it is an entry: this is the *prefix*. The entries of the last one or two units, the *pairs*, are separate: only the pair
of units 4 and 5 has a step.

Where the gradients stand (``grads``, a row for each entry, then SPARE more for each octet). The row of the entry that ends with
unit c of an octet holds X of the prefix after c if this prefix is an entry (c = 0, 1, 3, 7). Otherwise it holds X of the pair
(c = 2, 4, 5, 6), and X of the prefix is in one of the octet's own chunks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loglinear.kernels.channel.decays import load_log
from loglinear.kernels.delta.leaf import of_rows
from loglinear.kernels.delta.octet_maps import FIRST_PAIRED, PREFIXES, Units, locate_octet, prefix_slot, store_map
from loglinear.kernels.delta.products import load_erased, tokens_times, transposed_times
from loglinear.kernels.tree.decays import to_end
from loglinear.kernels.tree.place import OCTET
from loglinear.kernels.tree.tiles import load_block

SPARE = tl.constexpr(PREFIXES.value)


@triton.jit
def is_prefix(c):
    """Whether the map after unit c of an octet, from its first, is an entry of the tree."""
    return (c & (c + 1)) == 0


@triton.jit
def prefix_row(c, entry_row, spare_row):
    """Row of the gradient of the prefix after unit c; ``spare_row`` is the first of the octet's own."""
    return tl.where(is_prefix(c), entry_row, prefix_slot(c + 1, 0) + spare_row)


@triton.jit
def load_map_if(active, maps, site, first, S: tl.constexpr):
    """The map that ``store_map`` writes, float32; zero if not active."""
    base = maps + site * (S.K * (S.K + S.V))
    return load_block(base, S.K + S.V, 0, first, 0, tl.where(active, S.K + S.V, 0), S.K, S.BK, S.BN, True).to(
        tl.float32
    )


@triton.jit
def pull_back(x, units, site, at, local, TIER: tl.constexpr, S: tl.constexpr):
    """``Aᵀ X`` for the transition A of a unit, in tier 0 as ``γ X - Wᵀ (K_end X)``."""
    low = x.to(units.maps.dtype.element_ty)
    if TIER == 0:
        size = at.length - local * S.C
        origin = (at.start + local * S.C).to(tl.int64)
        keys = units.keys + origin * units.stride
        change = tokens_times(keys, units.stride, tl.arange(0, S.C) < size, low, S.BN, S)
        # Every unit has tokens. Without the condition the kernel spills 80 bytes (Triton 3.6, sm_90).
        decay = to_end(units.sums + origin, size, units.plane, S, size > 0)
        erased = load_erased(units.maps + site * (S.C * (S.K + S.V)), S)
        log = load_log(units.logs, site, 0, S) if S.CHANNELS else tl.load(units.logs + site)
        x = x * of_rows(tl.exp2(log), S)
        x = tl.dot(tl.trans(erased), (change * -decay[:, None]).to(low.dtype), x, input_precision=S.PRECISION)
    else:
        x = transposed_times(units.maps + site * (S.K * (S.K + S.V)), low, S.K + S.V, S)
    return x


@triton.jit(do_not_specialize=["T", "N", "NG", "all_tokens", "sums_stride", "spare"])
def octet_grads_kernel(
    k,
    maps,  # tier 0: writes [chunks, H, C, K+V]; above: maps of the units [units, H, K, K+V]
    sums,
    chunk_log,
    map_grads,  # [octets, H, K, K+V] gradients of the octets' whole maps, unless TOP
    grads,  # [chunks + spare rows, H, K, K+V]
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
    """Grid: octets x H x blocks of columns, blocks fastest. float32: X, decays. ``spare`` is the first spare row."""
    SIZE: tl.constexpr = OCTET**TIER  # chunks of a unit
    BLOCKS: tl.constexpr = (S.K + S.V + S.BN - 1) // S.BN
    pid = tl.program_id(0)
    first = pid % BLOCKS * S.BN
    h = pid // BLOCKS % S.H
    octet = pid // (BLOCKS * S.H)
    at, _ = locate_octet(octet, table, T, N, NG, TIER, S)
    if at.length < 0:
        return
    here = at.here
    head = h // (S.H // S.G) * S.K
    units = Units(maps, k + head, stride_k, sums + h.to(tl.int64) * sums_stride, all_tokens, chunk_log)
    if here > FIRST_PAIRED + 1:
        local = at.first + FIRST_PAIRED + 1
        chunk = at.chunk0 + (local + 1) * SIZE - 1
        both = load_map_if(here > FIRST_PAIRED + 1, grads, chunk.to(tl.int64) * S.H + h, first, S)
        both = pull_back(both, units, (at.unit0 + local).to(tl.int64) * S.HEADS + h, at, local, TIER, S)
        single = (chunk - SIZE).to(tl.int64) * S.H + h
        both += load_map_if(here > FIRST_PAIRED + 1, grads, single, first, S)
        store_map(grads, single, both, True, first, S)
    if TOP:
        x = tl.zeros([S.BK, S.BN], tl.float32)
    else:
        # Nothing reads a map that ends with an octet that is not whole.
        x = load_map_if(here == OCTET, map_grads, octet.to(tl.int64) * S.H + h, first, S)
    for i in range(here - 1):
        c = here - 1 - i
        local = at.first + c
        chunk = at.chunk0 + (local + 1) * SIZE - 1
        x += load_map_if(is_prefix(c) & (c + 1 < OCTET), grads, chunk.to(tl.int64) * S.H + h, first, S)
        target = prefix_row(c, chunk, spare + octet * SPARE).to(tl.int64) * S.H + h
        store_map(grads, target, x, True, first, S)
        x = pull_back(x, units, (at.unit0 + local).to(tl.int64) * S.HEADS + h, at, local, TIER, S)
    if here > 0:
        own = (at.chunk0 + (at.first + 1) * SIZE - 1).to(tl.int64) * S.H + h
        x += load_map_if(here > 0, grads, own, first, S)
        store_map(grads, own, x, True, first, S)
