"""DELTA, forward: the stages of the family whose span is a matrix ``[K, K]``. Twins of ``kernels/delta``.

With a gate per channel, queries and keys come decayed from ``channel.scores``, and no gate is left beside them.
A *map* of a span is one matrix ``[A | S]`` ``[K, K+V]``: a state X before the span leaves it as ``A X + S``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglinear.reference.dense import level_mask
from loglinear.reference.stages.channel import Prepared
from loglinear.reference.stages.place import OCTET, Inputs, Place, Tier, pair_decays, scales_of

PREFIXES = (3, 5, 6, 7)  # the prefix before these units is neither ``[I | 0]`` nor an entry


class Maps(NamedTuple):
    """The facts about the chunks that depend on no query. sums: ``[chunks, H, C]``. chunk_log: ``[chunks, H]``.

    solve: ``[chunks, H, C, C]``, ``(I + diag(β) Z)⁻¹ diag(β)``, Z the strictly earlier ``k·k`` with their decay. writes:
    ``[chunks, H, C, K+V]``, ``[W | U]``. entries: ``[chunks, H, K, K+V]``, the Fenwick array. units: for each tier the maps of
    its units. before: for each tier ``[octets, 8, H, K, K+V]``, the map of the units of an octet before each of them.

    With a gate per channel sums are zero, chunk_log is ``[chunks, H, K]``, and ``prepared`` is there.
    """

    sums: Tensor
    chunk_log: Tensor
    solve: Tensor
    writes: Tensor
    entries: Tensor
    units: tuple[Tensor, ...]
    before: tuple[Tensor, ...]
    prepared: Prepared | None = None


def decayed(x: Inputs, prepared: Prepared) -> Inputs:
    """The inputs of the stages under a gate per channel."""
    return x._replace(q=prepared.q, k=prepared.k, g=torch.zeros_like(x.beta))


def end_keys(x: Inputs, sums: Tensor) -> Tensor:
    """K_end ``[chunks, H, C, K]``: the keys, decayed to the end of their chunk."""
    return x.k * (sums[..., -1:] - sums).exp().unsqueeze(3)


def start_keys(x: Inputs, sums: Tensor, prepared: Prepared | None) -> Tensor:
    """The keys ``[chunks, H, C, K]``, decayed from the start of their chunk."""
    return x.k * sums.exp().unsqueeze(3) if prepared is None else prepared.starts


def overlaps(x: Inputs, sums: Tensor, prepared: Prepared | None) -> Tensor:
    """Z ``[chunks, H, C, C]``: the products of each key with the strictly earlier ones of its chunk, decayed."""
    products = (x.k @ x.k.mT) * pair_decays(sums) if prepared is None else prepared.overlaps
    return products.tril(-1)


def compose(later: Tensor, earlier: Tensor) -> Tensor:
    """The map of two spans: ``[A A' | A S' + S]``."""
    width = later.shape[-2]
    product = later[..., :width] @ earlier
    return torch.cat([product[..., :width], product[..., width:] + later[..., width:]], -1)


def identity_like(maps: Tensor) -> Tensor:
    """``[I | 0]`` of the shape of ``maps``."""
    return torch.eye(*maps.shape[-2:], dtype=maps.dtype, device=maps.device).expand_as(maps)


def chunk_maps(place: Place, x: Inputs, prepared: Prepared | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sums, chunk_log, solve and writes of ``Maps``."""
    sums, beta = x.g.cumsum(2), x.beta
    lower = beta.unsqueeze(3) * overlaps(x, sums, prepared)
    unit = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    solve = torch.linalg.solve_triangular(unit + lower, torch.diag_embed(beta), upper=False, unitriangular=True)
    writes = solve @ torch.cat([start_keys(x, sums, prepared), x.v], 3)
    return sums, x.g.sum(2) if prepared is None else prepared.chunk_log, solve, writes


def leaf_maps(x: Inputs, sums: Tensor, chunk_log: Tensor, writes: Tensor) -> Tensor:
    """``[chunks, H, K, K+V]``, the map of each chunk: ``[γ I - K_endᵀ W | K_endᵀ U]``. The kernels never form it."""
    width = x.k.shape[3]
    added = end_keys(x, sums).mT @ torch.cat([-writes[..., :width], writes[..., width:]], 3)
    decay = chunk_log.exp() if chunk_log.dim() == 3 else chunk_log.exp().unsqueeze(2)
    return decay.unsqueeze(3) * identity_like(added) + added


def octet_maps(tier: Tier, units: Tensor, entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(maps before each unit ``[octets, 8, H, K, K+V]``, maps of the octets, entries, with those inside the octets).

    After unit c of an octet, from 0, an entry ends: the *prefix* of all units so far for c = 0, 1, 3, 7, otherwise the unit
    alone, or for c = 5 the *pair* of units 4 and 5. Missing units change nothing. An octet of the next tier overwrites the
    entries that also hold units of other octets.
    """
    padded = torch.cat([units, identity_like(units[:1])]) if len(units) else units
    prefix = [identity_like(padded[tier.unit[:, 0]])]
    for c in range(OCTET):
        unit = padded[tier.unit[:, c]]
        prefix.append(compose(unit, prefix[c]))
        entry = prefix[c + 1] if is_prefix(c) else unit
        if c == 5:
            entry = compose(unit, padded[tier.unit[:, 4]])
        there = tier.unit[:, c] >= 0
        entries = entries.index_copy(0, tier.chunk[there, c], entry[there])
    return torch.stack(prefix[:OCTET], 1), prefix[OCTET], entries


def is_prefix(c: int) -> bool:
    """Whether the map of an octet's units up to unit c is an entry."""
    return c & (c + 1) == 0


def all_maps(place: Place, x: Inputs, prepared: Prepared | None = None) -> Maps:
    """``chunk_maps``, then ``octet_maps`` of each tier, from the chunks up."""
    sums, chunk_log, solve, writes = chunk_maps(place, x, prepared)
    octets = leaf_maps(x, sums, chunk_log, writes)
    entries = octets
    units: list[Tensor] = []
    before: list[Tensor] = []
    for tier in place.tiers:
        units.append(octets)
        prefixes, octets, entries = octet_maps(tier, octets, entries)
        before.append(prefixes)
    return Maps(sums, chunk_log, solve, writes, entries, tuple(units), tuple(before), prepared)


def path_states(place: Place, entries: Tensor) -> Tensor:
    """``[slots, H, K, K+V]``: ``[T_j | T_j S_j]`` of entry j on the path of each octet, as seen from the octet's start.

    ``T_0 = I`` and ``T_{j+1} = T_j A_j``. Zero where j = 0: the entry itself is read there. T_1 is its A; the kernels do not
    store it again.
    """
    width, octets = entries.shape[2], len(place.tiers[0].unit)
    states = entries.new_zeros(place.path_slots, *entries.shape[1:])
    carried = identity_like(entries.new_empty(octets, *entries.shape[1:3], width))
    for j, (octet, entry, slot) in enumerate(place.outer):
        product = carried[octet] @ entries[entry]
        if j > 0:
            states = states.index_copy(0, slot, torch.cat([carried[octet], product[..., width:]], 3))
        carried = carried.index_copy(0, octet, product[..., :width])
    return states


def within(x: Inputs, maps: Maps) -> Tensor:
    """P ``[chunks, H, C, C]``: ``tril(Q Kᵀ)`` of a chunk, decayed."""
    return (x.q @ x.k.mT) * pair_decays(maps.sums) if maps.prepared is None else maps.prepared.scores


def start_queries(x: Inputs, maps: Maps) -> Tensor:
    """The queries ``[chunks, H, C, K]`` as seen from the start of their chunk, ``γ Q - P W``."""
    return x.q * maps.sums.exp().unsqueeze(3) - within(x, maps) @ maps.writes[..., : x.k.shape[3]]


def _inner_path(place: Place, x: Inputs, maps: Maps) -> Iterator[tuple[Any, ...]]:
    """For each level m below an octet: (m, chunks, their entries, slots, queries before the entry); at last the queries
    ``[chunks, H, C, K]`` at the start of their octet."""
    queries, width = start_queries(x, maps), x.k.shape[3]
    for m, (chunk, entry, slot) in enumerate(place.inner):
        yield m, chunk, entry, slot, queries[chunk]
        queries = queries.index_copy(0, chunk, queries[chunk] @ maps.entries[entry, ..., :width])
    yield None, None, None, None, queries


def path_queries(place: Place, x: Inputs, maps: Maps) -> tuple[Tensor, Tensor]:
    """(queries before each entry of their path inside the octet ``[inner_slots, H, C, K]``, nearest first; queries at the
    start of their octet ``[chunks, H, C, K]``, zero in the first octet of a sequence)."""
    inner = x.q.new_zeros(place.inner_slots, *x.q.shape[1:])
    for m, _, _, slot, queries in _inner_path(place, x, maps):
        if m is not None:
            inner = inner.index_copy(0, slot, queries)
    return inner, queries * (place.n >= OCTET)[:, None, None, None]


def path_reads(place: Place, entries: Tensor, states: Tensor) -> Iterator[tuple[Any, ...]]:
    """For each place j on a path of octets: (chunks, level of the entry, its state ``[n, H, K, V]`` as the octet sees it)."""
    width = entries.shape[2]
    for j, (chunk, entry, slot, m) in enumerate(place.before):
        yield chunk, m, (entries[entry] if j == 0 else states[slot])[..., width:]


def output(place: Place, x: Inputs, maps: Maps, states: Tensor) -> Tensor:
    """o ``[chunks, H, C, V]``: masked attention inside a chunk, its entries inside the octet, the states before the octet."""
    o, width = ((within(x, maps) @ maps.solve) * level_mask(x.scales)) @ x.v, x.k.shape[3]
    for m, chunk, entry, _, queries in _inner_path(place, x, maps):
        if m is not None:
            read = queries @ maps.entries[entry, ..., width:]
            o = o.index_add(0, chunk, scales_of(x, chunk, m).unsqueeze(3) * read)
    for chunk, m, state in path_reads(place, maps.entries, states):
        o = o.index_add(0, chunk, scales_of(x, chunk, m).unsqueeze(3) * (queries[chunk] @ state))
    return o
