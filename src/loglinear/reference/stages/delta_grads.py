"""DELTA, backward: the gradients of ``delta.py``, stage by stage. Twins of ``kernels/delta``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglinear.reference.dense import level_mask
from loglinear.reference.stages import channel
from loglinear.reference.stages.delta import (
    Maps,
    all_maps,
    decayed,
    end_keys,
    identity_like,
    is_prefix,
    output,
    overlaps,
    path_queries,
    path_reads,
    path_states,
    start_keys,
    within,
)
from loglinear.reference.stages.place import (
    GATE_FLOOR,
    OCTET,
    Inputs,
    Place,
    Tier,
    add_level,
    cut,
    pair_decays,
    scales_of,
    sums_by_level,
)
from loglinear.transition import is_per_channel


def path_grads(
    place: Place, x: Inputs, maps: Maps, states: Tensor, inner_queries: Tensor, octet_queries: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of the queries after each entry inside the octet ``[inner_slots, H, C, K]``, gradient of the queries at the
    start of their chunk ``[chunks, H, C, K]``, dλ of the levels above a chunk): the path walked from its oldest entry."""
    width = x.k.shape[3]
    grads, dscales, after = torch.zeros_like(x.q), torch.zeros_like(x.scales), torch.zeros_like(inner_queries)
    for chunk, m, state in path_reads(place, maps.entries, states):
        product = x.do[chunk] @ state.mT
        grads = grads.index_add(0, chunk, scales_of(x, chunk, m).unsqueeze(3) * product)
        dscales = add_level(dscales, x, chunk, m, (product * octet_queries[chunk]).sum(3))
    for m, (chunk, entry, slot) in reversed(list(enumerate(place.inner))):
        after = after.index_copy(0, slot, grads[chunk])
        product = x.do[chunk] @ maps.entries[entry, ..., width:].mT
        before = grads[chunk] @ maps.entries[entry, ..., :width].mT + scales_of(x, chunk, m).unsqueeze(3) * product
        grads = grads.index_copy(0, chunk, before)
        dscales = add_level(dscales, x, chunk, m, (product * inner_queries[slot]).sum(3))
    return after, grads, dscales


def entry_grads(place: Place, x: Inputs, inner_queries: Tensor, inner_grads: Tensor) -> Tensor:
    """``[dA | dS]`` ``[chunks, H, K, K+V]`` of the entries inside octets, from the chunks of their windows."""
    total = x.q.new_zeros(place.all_chunks, x.q.shape[1], x.q.shape[3], x.q.shape[3] + x.v.shape[3])
    for m, (chunk, entry, slot) in enumerate(place.inner):
        right = torch.cat([inner_grads[slot], scales_of(x, chunk, m).unsqueeze(3) * x.do[chunk]], 3)
        total = total.index_add(0, entry, inner_queries[slot].mT @ right)
    return total


def path_state_grads(place: Place, x: Inputs, octet_queries: Tensor) -> Tensor:
    """``d(T_j S_j)`` ``[slots, H, K, V]`` of every state on the path of an octet, from the octet's chunks."""
    total = x.q.new_zeros(place.path_slots, x.q.shape[1], x.q.shape[3], x.v.shape[3])
    for chunk, _, slot, m in place.before:
        weighted = scales_of(x, chunk, m).unsqueeze(3) * x.do[chunk]
        total = total.index_add(0, slot, octet_queries[chunk].mT @ weighted)
    return total


def transport_grads(place: Place, entries: Tensor, state_grads: Tensor) -> Tensor:
    """``[dT_{j+1} | d(T_j S_j)]`` ``[slots, H, K, K+V]``, no dT for the last entry of a path: from the oldest entry back,
    ``dT_j = d(T_j S_j) S_jᵀ + dT_{j+1} A_jᵀ``."""
    width = entries.shape[2]
    after = state_grads.new_zeros(*state_grads.shape[:3], width)
    for j, (_, entry, slot) in reversed(list(enumerate(place.outer))):
        if j > 0:
            both = torch.cat([after[slot], state_grads[slot]], 3)
            after = after.index_copy(0, slot - 1, both @ entries[entry].mT)
    return torch.cat([after, state_grads], 3)


def wide_entry_grads(place: Place, entries: Tensor, states: Tensor, path_grads: Tensor, grads: Tensor) -> Tensor:
    """``grads`` with those of the entries of whole octets: ``T_jᵀ [dT_{j+1} | d(T_j S_j)]`` over the octets that read them."""
    width = entries.shape[2]
    for j, (_, entry, slot) in enumerate(place.outer):
        share = path_grads[slot]
        if j > 0:
            share = states[slot][..., :width].mT @ share
        grads = grads.index_add(0, entry, share)
    return grads


def octet_grads(tier: Tier, units: Tensor, whole_grads: Tensor | None, grads: Tensor) -> tuple[Tensor, Tensor]:
    """(X ``[octets, 8, H, K, K+V]``, the gradient of the prefix after each unit; ``grads``, where that of the single unit 4 has
    got the share of the pair 4 and 5).

    X after the last unit is the gradient of the whole octet's map; before a unit (A, S) it is ``Aᵀ X``. An entry's own
    gradient joins where the prefix is an entry, except that of the whole octet, which the next tier has counted.
    """
    transitions = torch.cat([units, units.new_zeros(1, *units.shape[1:])])[..., : units.shape[2]]
    pair = tier.unit[:, 5] >= 0
    back = transitions[tier.unit[pair, 5]].mT @ grads[tier.chunk[pair, 5]]
    grads = grads.index_add(0, tier.chunk[pair, 4], back)
    x = grads.new_zeros(len(tier.unit), *grads.shape[1:])
    if whole_grads is not None:
        x = torch.where(tier.whole[:, None, None, None], whole_grads, x)
    found = []
    for c in reversed(range(OCTET)):
        if is_prefix(c) and c + 1 < OCTET:
            there = (tier.unit[:, c] >= 0)[:, None, None, None]
            x = x + torch.where(there, grads[tier.chunk[:, c]], 0.0)
        found.append(x)
        x = transitions[tier.unit[:, c]].mT @ x
    return torch.stack(found[::-1], 1), grads


def closed_maps(tier: Tier, x: Tensor, before: Tensor, entries: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """(gradients, maps before) ``[octets, 8, 2, H, K, K+V]`` of the two maps that a unit may close: the prefix, and the entry
    of one or two units where that is another map; zero otherwise."""
    own, first = torch.zeros_like(x), identity_like(x).clone()
    for c in (2, 4, 5, 6):
        there = tier.unit[:, c] >= 0
        own[there, c] = grads[tier.chunk[there, c]]
    there = tier.unit[:, 5] >= 0
    first[there, 5] = entries[tier.chunk[there, 4]]
    return torch.stack([x, own], 2), torch.stack([before, first], 2)


def unit_grads(tier: Tier, count: int, x: Tensor, before: Tensor, entries: Tensor, grads: Tensor) -> Tensor:
    """``[dA | dS]`` ``[count, H, K, K+V]`` of every unit's own map: ``dA = X Yᵀ``, with Y the map before it, and dS = X's S."""
    width = entries.shape[2]
    after, earlier = closed_maps(tier, x, before, entries, grads)
    total = torch.cat([after @ earlier.mT, after[..., width:]], 5).sum(2)
    there = tier.unit >= 0
    return total.new_zeros(count, *total.shape[2:]).index_copy(0, tier.unit[there], total[there])


class ScoreGrads(NamedTuple):
    """The matrices ``[chunks, H, C, C]`` of a chunk: P; ``Λ ∘ (P T)``; ``dP ∘ Γ``; P's share ``Pᵀ dR`` of dT, T the solve.

    dscales: dλ, completed. gains ``[chunks, H, C]``: the queries' share of dg, as differences from token to token.
    """

    products: Tensor
    masked: Tensor
    product_grads: Tensor
    solve_grads: Tensor
    dscales: Tensor
    gains: Tensor


def score_grads(place: Place, x: Inputs, maps: Maps, query_grads: Tensor, dscales: Tensor) -> ScoreGrads:
    """Gradients of the scores ``R = P T`` inside a chunk, and of P and T."""
    products, mask, outer = within(x, maps), level_mask(x.scales), x.do @ x.v.mT
    scores = products @ maps.solve
    dscores = outer * mask
    dproducts = dscores @ maps.solve.mT - query_grads @ maps.writes[..., : x.k.shape[3]].mT
    pairs = dproducts * products
    gains = pairs.sum(3) - pairs.sum(2) + (x.q * query_grads).sum(3) * maps.sums.exp()
    dscales = dscales + sums_by_level(x, scores * outer)
    decayed = dproducts * pair_decays(maps.sums)
    return ScoreGrads(products, scores * mask, decayed, products.mT @ dscores, dscales, gains)


class MapGrads(NamedTuple):
    """writes: dW ``[chunks, H, C, K]``. keys: dk through K_end, likewise. dv ``[chunks, H, C, V]``. solve: dT, complete.

    ends ``[chunks, H, C]``, chunks ``[chunks, H]``: shares of dg of the decay to the end of the chunk, and of the whole
    chunk's; with a gate per channel chunks is ``[chunks, H, K]``.
    """

    writes: Tensor
    keys: Tensor
    dv: Tensor
    solve: Tensor
    ends: Tensor
    chunks: Tensor


def map_grads(
    place: Place, x: Inputs, maps: Maps, prefix_grads: Tensor, grads: Tensor, query_grads: Tensor, scores: ScoreGrads
) -> MapGrads:
    """From the gradients X of the maps that a chunk closes. It takes a map Y to ``γ Y + K_endᵀ D``, ``D = [0 | U] - W Y``."""
    tier, width = place.tiers[0], x.k.shape[3]
    after, before = closed_maps(tier, prefix_grads, maps.before[0], maps.entries, grads)
    there = tier.unit >= 0
    after, before = after[there].transpose(0, 1), before[there].transpose(0, 1)  # [2, chunks, H, K, K+V]
    erased, added = maps.writes[..., :width], maps.writes[..., width:]
    keys, to_end = end_keys(x, maps.sums), (maps.sums[..., -1:] - maps.sums).exp().unsqueeze(3)
    changes = torch.cat([torch.zeros_like(erased), added], 3) - erased @ before
    dchanges = keys @ after
    dwrites = -(dchanges @ before.mT).sum(0) - scores.products.mT @ query_grads
    dadded = dchanges[..., width:].sum(0)
    dkeys = (changes @ after.mT).sum(0) * to_end
    dv = scores.masked.mT @ x.do + maps.solve.mT @ dadded
    dsolve = scores.solve_grads + dwrites @ start_keys(x, maps.sums, maps.prepared).mT + dadded @ x.v.mT
    trace = (after * before).sum((0, 3, 4) if maps.prepared is None else (0, 4)) * maps.chunk_log.exp()
    return MapGrads(dwrites, dkeys, dv, dsolve, (dkeys * x.k).sum(3), trace)


def inverse_grads(x: Inputs, maps: Maps, solve_grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Z, dZ ``[chunks, H, C, C]``, dβ ``[chunks, H, C]``), through the inverse ``X = (I + diag(β) Z)⁻¹``.

    With T = X diag(β) and ``E = Xᵀ dT``: ``d(diag(β) Z) = -tril(E Tᵀ, -1)``, and dβ is E's diagonal and the share through Z.
    """
    overlap = overlaps(x, maps.sums, maps.prepared)
    unit = torch.eye(overlap.shape[-1], dtype=overlap.dtype, device=overlap.device)
    e = (unit - maps.solve @ overlap).mT @ solve_grads
    dlower = -(e @ maps.solve.mT).tril(-1)
    dbeta = e.diagonal(dim1=2, dim2=3) + (dlower * overlap).sum(3)
    return overlap, dlower * x.beta.unsqueeze(3), dbeta


def key_grads(
    place: Place, x: Inputs, maps: Maps, query_grads: Tensor, scores: ScoreGrads, found: MapGrads
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk ``[chunks, H, C, K]`` of each head, dβ, dg ``[chunks, H, C]``)."""
    from_start = maps.sums.exp().unsqueeze(3)
    overlap, doverlap, dbeta = inverse_grads(x, maps, found.solve)
    decayed = doverlap * pair_decays(maps.sums)
    dq = query_grads * from_start + scores.product_grads @ x.k
    erased = maps.solve.mT @ found.writes * from_start
    dk = erased + found.keys + (decayed + decayed.mT) @ x.k + scores.product_grads.mT @ x.q
    pairs = doverlap * overlap
    gain = scores.gains + pairs.sum(3) - pairs.sum(2) + (erased * x.k).sum(3)
    earlier_ends = found.ends.cumsum(2) - found.ends
    dg = gain.flip(2).cumsum(2).flip(2) + earlier_ends + found.chunks.unsqueeze(2)
    return dq, dk, dbeta, torch.where(x.g > GATE_FLOOR, dg, 0.0)


def channel_key_grads(
    x: Inputs, maps: Maps, prepared: channel.Prepared, query_grads: Tensor, found: MapGrads
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dβ with a gate per channel, and what ``channel.gate_grads`` needs: dZ, the gradient of ``Prepared.starts``, and the gains
    ``[chunks, H, blocks, K]`` of the pairs of two chunks around each block, or around its chunk."""
    _, doverlap, dbeta = inverse_grads(x, maps, found.solve)
    dstarts = maps.solve.mT @ found.writes
    seen = query_grads * prepared.q + dstarts * prepared.starts
    around = channel.other_blocks(seen, found.keys * prepared.k) + found.chunks.unsqueeze(2)
    return dbeta, doverlap, dstarts, around


def tree_grads(place: Place, maps: Maps, grads: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """``octet_grads`` and ``unit_grads`` of each tier, from the top down: (X by tier, gradients of the units' maps of tier 1
    on, ``grads``)."""
    found: list[Tensor] = []
    units: list[Tensor] = []
    for t in reversed(range(len(place.tiers))):
        x, grads = octet_grads(place.tiers[t], maps.units[t], units[0] if units else None, grads)
        found.insert(0, x)
        if t > 0:
            count = len(maps.units[t])
            units.insert(0, unit_grads(place.tiers[t], count, x, maps.before[t], maps.entries, grads))
    return found, units, grads


def trace(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    level_scales: Tensor,
    do: Tensor,
    scale: float = 1.0,
    lengths: tuple[int, ...] | None = None,
    chunk_size: int = 64,
) -> tuple[Place, Inputs, dict[str, Any]]:
    """(place, inputs, what each stage makes, by name) of a forward and a backward pass; arguments as the public op's.

    lengths: tokens of packed sequences, in a batch of one. The last names are o, dq, dk, dv, dg, dbeta and dlevel_scales.
    """
    place = Place(lengths or (q.shape[1],) * q.shape[0], chunk_size, q.device)
    given = x = cut(place, q, k, v, g, level_scales, beta, do, scale)
    prepared = channel.scores(x) if g is not None and is_per_channel(g) else None
    if prepared is not None:
        x = decayed(x, prepared)
    maps = all_maps(place, x, prepared)
    states = path_states(place, maps.entries)
    made: dict[str, Any] = {**maps._asdict(), "path_states": states, "output": output(place, x, maps, states)}
    inner_queries, octet_queries = path_queries(place, x, maps)
    inner_grads, query_grads, dscales = path_grads(place, x, maps, states, inner_queries, octet_queries)
    state_grads = path_state_grads(place, x, octet_queries)
    carried = transport_grads(place, maps.entries, state_grads)
    own = entry_grads(place, x, inner_queries, inner_grads)
    own = wide_entry_grads(place, maps.entries, states, carried, own)
    prefix_grads, units, grads = tree_grads(place, maps, own)
    scores = score_grads(place, x, maps, query_grads, dscales)
    found = map_grads(place, x, maps, prefix_grads[0], grads, query_grads, scores)
    if prepared is None:
        dq, dk, dbeta, dg = key_grads(place, x, maps, query_grads, scores, found)
    else:
        made |= {f"prepared.{name}": y for name, y in prepared._asdict().items()}
        dbeta, *rest = channel_key_grads(x, maps, prepared, query_grads, found)
        made |= dict(zip(("overlap_grads", "dstarts", "around"), rest))
        pairs = scores.product_grads, query_grads, found.keys, rest[2], *rest[:2]
        dq, dk, dg = channel.gate_grads(given, prepared, *pairs)
    made |= {"inner_queries": inner_queries, "octet_queries": octet_queries, "inner_grads": inner_grads}
    made |= {"query_grads": query_grads, "path_grads": carried, "entry_grads": own, "unit_grads": units}
    made |= {"prefix_grads": prefix_grads, "upper_scales": dscales * scale}
    made |= {**scores._asdict(), **{f"map.{name}": y for name, y in found._asdict().items()}}
    results = {"o": place.tokens(made["output"], v), "dq": place.summed(dq, q), "dk": place.summed(dk, k)}
    results |= {name: place.tokens(y, v) for name, y in (("dv", found.dv), ("dg", dg), ("dbeta", dbeta))}
    results["dlevel_scales"] = place.tokens(scores.dscales * scale, v)
    return place, x, made | results
