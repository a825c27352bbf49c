"""DECAY: the stages of the family whose span is a log for each head. Twins of ``kernels/decay``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglinear.reference.dense import level_mask
from loglinear.reference.stages.place import (
    GATE_FLOOR,
    LOG_OCTET,
    Inputs,
    Place,
    add_level,
    cut,
    pair_decays,
    scales_of,
    sums_by_level,
)


class States(NamedTuple):
    """sums: ``[chunks, H, C]``, cumulative log-decay inside each chunk. chunk_log, entry_log: ``[chunks, H]``. entries:
    ``[chunks, H, K, V]``, the Fenwick array."""

    sums: Tensor
    chunk_log: Tensor
    entry_log: Tensor
    entries: Tensor


class Gains(NamedTuple):
    """Shares of q·dq and k·dk that the gate's gradient is made of. rows, columns: ``[chunks, H, C]``, of a token with all
    keys before it, and with all queries after it. chunks: ``[chunks, H]``, of a chunk's keys with later chunks. levels:
    ``[tree levels, chunks, H]``, of a chunk's queries with the entry of each level. beyond: ``[chunks, H]``, of the keys of an
    entry with the queries past its window; zero for entries of a single chunk.
    """

    rows: Tensor
    columns: Tensor
    chunks: Tensor
    levels: Tensor
    beyond: Tensor


def _to_end(sums: Tensor) -> Tensor:
    """Decay from each token of a chunk to its end, ``[chunks, H, C, 1]``."""
    return (sums[..., -1:] - sums).exp().unsqueeze(3)


def _folded(place: Place, states: States, levels: range) -> States:
    """Each entry of these levels folds in the entry before it."""
    entries, log = states.entries, states.entry_log
    for m in levels:
        entry, earlier = place.builds[m]
        entries = entries.index_add(0, entry, log[entry].exp()[..., None, None] * entries[earlier])
        log = log.index_add(0, entry, log[earlier])
    return states._replace(entries=entries, entry_log=log)


def chunk_states(place: Place, x: Inputs) -> States:
    """The entries of up to eight chunks; a longer entry holds the state of its last eight."""
    sums, total = x.g.cumsum(2), x.g.sum(2)
    states = States(sums, total, total, x.k.mT @ (x.v * _to_end(sums)))
    return _folded(place, states, place.levels[:LOG_OCTET])


def node_states(place: Place, states: States) -> States:
    """The longer entries, from the states of octets."""
    return _folded(place, states, place.levels[LOG_OCTET:])


def path(place: Place, states: States, levels: range | None = None) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """For each level m: (m, chunks, their entries, decay ``[n, H, C]`` from the end of the entry to each token)."""
    since = torch.zeros_like(states.chunk_log)
    for m in place.levels:
        chunk, entry = place.reads[m]
        if levels is None or m in levels:
            yield m, chunk, entry, (states.sums[chunk] + since[chunk].unsqueeze(2)).exp()
        since = since.index_add(0, chunk, states.entry_log[entry])


def output(place: Place, x: Inputs, states: States) -> Tensor:
    """o ``[chunks, H, C, V]``: masked attention inside a chunk, then the entries on its path."""
    o = ((x.q @ x.k.mT) * pair_decays(states.sums) * level_mask(x.scales)) @ x.v
    for m, chunk, entry, decay in path(place, states):
        weight = (scales_of(x, chunk, m) * decay).unsqueeze(3)
        o = o.index_add(0, chunk, weight * (x.q[chunk] @ states.entries[entry]))
    return o


def local_grads(place: Place, x: Inputs, states: States) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gradient of the scores ``[chunks, H, C, C]``, dλ of the levels inside a chunk, the same levels' gains: chunks,
    columns).
    """
    outer, decays = x.do @ x.v.mT, pair_decays(states.sums)
    weights = decays * level_mask(x.scales)
    pairs = (x.q @ x.k.mT) * outer
    apart = pairs - torch.diag_embed(pairs.diagonal(dim1=2, dim2=3))
    return outer * weights, sums_by_level(x, pairs * decays), (apart * weights).sum(3), (apart * weights).sum(2)


def query_grads(
    place: Place, x: Inputs, states: States, score_grads: Tensor, dscales: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq ``[chunks, H, C, K]`` of each head, dλ, gains of the rows, gains by level); the middle two are completed."""
    dq, levels = score_grads @ x.k, [torch.zeros_like(states.chunk_log) for _ in place.levels]
    for m, chunk, entry, decay in path(place, states):
        product = x.do[chunk] @ states.entries[entry].mT
        scale, gain = scales_of(x, chunk, m), (product * x.q[chunk]).sum(3) * decay
        dq = dq.index_add(0, chunk, (scale * decay).unsqueeze(3) * product)
        dscales = add_level(dscales, x, chunk, m, gain)
        rows = rows.index_add(0, chunk, gain * scale)
        levels[m] = levels[m].index_add(0, chunk, (gain * scale).sum(2))
    return dq, dscales, rows, torch.stack(levels) if levels else rows.new_zeros(0, *states.chunk_log.shape)


def _entry_grads(place: Place, x: Inputs, states: States, levels: range) -> Tensor:
    """Gradient ``[chunks, H, K, V]`` of the entries of these levels, each from the chunks of its window."""
    total = torch.zeros_like(states.entries)
    for m, chunk, entry, decay in path(place, states, levels):
        weighted = (scales_of(x, chunk, m) * decay).unsqueeze(3) * x.do[chunk]
        total = total.index_add(0, entry, x.q[chunk].mT @ weighted)
    return total


def node_grads(place: Place, x: Inputs, states: States) -> Tensor:
    """Gradient ``[octets, H, K, V]`` of the entry of a whole octet or more that ends with each octet."""
    octet, chunk = place.octet_end
    found = _entry_grads(place, x, states, place.levels[LOG_OCTET:])
    total = found.new_zeros(len(place.tiers[0].unit), *found.shape[1:])
    return total.index_copy(0, octet, found[chunk])


def chunk_grads(place: Place, x: Inputs, states: States, node_grads: Tensor) -> tuple[Tensor, Tensor]:
    """(D ``[chunks, H, K, V]``, gradient of the state at the end of each chunk; gains beyond the window of an entry).

    D of a chunk is the gradient of the entry that ends there, plus D of the next entry on the update path, decayed back.
    """
    octet, chunk = place.octet_end
    total = _entry_grads(place, x, states, place.levels[:LOG_OCTET]).index_add(0, chunk, node_grads[octet])
    upto, beyond = states.chunk_log.cumsum(0), torch.zeros_like(states.chunk_log)
    for m in reversed(place.levels):
        entry, parent = place.parents[m]
        back = (upto[parent] - upto[entry]).exp()
        if m > 0:
            passed = (total[parent] * states.entries[entry]).sum((2, 3)) * back
            beyond = beyond.index_add(0, entry, passed)
        total = total.index_add(0, entry, back[..., None, None] * total[parent])
    return total, beyond


def value_grads(
    place: Place, x: Inputs, states: States, chunk_grads: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dv ``[chunks, H, C, V]``, gains of the columns, completed, and of the chunks)."""
    later = (x.k @ chunk_grads) * _to_end(states.sums)
    weights = (x.q @ x.k.mT) * pair_decays(states.sums) * level_mask(x.scales)
    gain = (later * x.v).sum(3)
    return later + weights.mT @ x.do, columns + gain, gain.sum(2)


def key_grads(place: Place, x: Inputs, states: States, chunk_grads: Tensor, score_grads: Tensor) -> Tensor:
    """dk ``[chunks, H, C, K]`` of each head."""
    return score_grads.mT @ x.q + (x.v * _to_end(states.sums)) @ chunk_grads.mT


def gate_grads(place: Place, x: Inputs, gains: Gains) -> Tensor:
    """dg ``[chunks, H, C]``: for each token the pairs of a query from it on and a key before it.

    Their parts: the query in this chunk; the key in this chunk and the query in a later one; both elsewhere.
    """
    skips = torch.zeros_like(gains.chunks)
    for m in place.levels:
        chunk, entry = place.reads[m]
        n, first = place.n[chunk], place.sequence[chunk]
        same_window = (first[:, None] == first[None, :]) & (n[:, None] >> m == n[None, :] >> m)
        later = (same_window & (n[:, None] < n[None, :])).to(skips.dtype)
        own = gains.levels[m][chunk]
        past = gains.beyond[entry] if m > 0 else gains.chunks[entry] - own
        past = torch.where((((n >> m) + 1 << m) < place.chunks[chunk]).unsqueeze(1), past, 0.0)
        skips = skips.index_add(0, chunk, later @ own + past)
    difference = gains.rows - gains.columns
    inside = difference.flip(2).cumsum(2).flip(2)
    return torch.where(x.g > GATE_FLOOR, inside + (gains.chunks + skips).unsqueeze(2), 0.0)


def trace(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    level_scales: Tensor,
    do: Tensor,
    scale: float = 1.0,
    lengths: tuple[int, ...] | None = None,
    chunk_size: int = 64,
) -> tuple[Place, Inputs, dict[str, Any]]:
    """(place, inputs, what each stage makes, by name) of a forward and a backward pass; arguments as the public op's.

    lengths: tokens of packed sequences, in a batch of one. The last names are o, dq, dk, dv, dg and dlevel_scales.
    """
    place = Place(lengths or (q.shape[1],) * q.shape[0], chunk_size, q.device)
    x = cut(place, q, k, v, g, level_scales, None, do, scale)
    short = chunk_states(place, x)
    states = node_states(place, short)
    made: dict[str, Any] = {"short_entries": short.entries, **states._asdict(), "output": output(place, x, states)}
    score_grads, local_scales, inner_rows, inner_columns = local_grads(place, x, states)
    dq, dscales, rows, by_level = query_grads(place, x, states, score_grads, local_scales, inner_rows)
    nodes = node_grads(place, x, states)
    ends, beyond = chunk_grads(place, x, states, nodes)
    dv, columns, chunks = value_grads(place, x, states, ends, inner_columns)
    dk = key_grads(place, x, states, ends, score_grads)
    gains = Gains(rows, columns, chunks, by_level, beyond)
    made |= {"score_grads": score_grads, "node_grads": nodes, "chunk_grads": ends}
    made |= {"local_scales": local_scales * scale, "inner_rows": inner_rows, "inner_columns": inner_columns}
    made |= {f"gains.{name}": y for name, y in gains._asdict().items()}
    results = {"o": place.tokens(made["output"], v), "dq": place.summed(dq, q), "dk": place.summed(dk, k)}
    results |= {"dv": place.tokens(dv, v), "dg": place.tokens(gate_grads(place, x, gains), v)}
    results["dlevel_scales"] = place.tokens(dscales * scale, v)
    return place, x, made | results
