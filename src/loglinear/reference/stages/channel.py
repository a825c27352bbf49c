"""CHANNEL: the stages of a gate per key channel. Twins of ``kernels/channel``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglinear.reference.dense import level_mask
from loglinear.reference.stages.place import GATE_FLOOR, Inputs, Place, add_level, cut, scales_of, sums_by_level

SUB = 16  # most tokens of a block


class Prepared(NamedTuple):
    """sums: ``[chunks, H, C, K]``, cumulative log-decay inside each chunk. chunk_log: ``[chunks, H, K]``. q, k: ``[chunks, H,
    C, K]``, queries as seen from the start of their chunk, keys from its end. scores: ``[chunks, H, C, C]`` with their decays.

    starts, overlaps: with the delta rule, keys as seen from the start of their chunk, and scores of keys with keys.
    """

    sums: Tensor
    chunk_log: Tensor
    q: Tensor
    k: Tensor
    scores: Tensor
    starts: Tensor = None  # type: ignore[assignment]
    overlaps: Tensor = None  # type: ignore[assignment]


def _pair_decays(sums: Tensor) -> Tensor:
    """Decay ``[chunks, H, C, C, K]`` from a token (column) to a later one (row) of its chunk, zero above the diagonal."""
    difference = sums.unsqueeze(3) - sums.unsqueeze(2)
    earlier = torch.ones(sums.shape[2], sums.shape[2], device=sums.device).tril().to(sums.dtype)
    return difference.clamp(max=0.0).exp() * earlier.unsqueeze(2)


def scores(x: Inputs) -> Prepared:
    """The prepared chunks."""
    sums, product = x.g.cumsum(2), "nhtk,nhsk,nhtsk->nhts"
    late, decays = sums.exp(), _pair_decays(sums)
    pairs = torch.einsum(product, x.q, x.k, decays)
    made = Prepared(sums, sums[:, :, -1], x.q * late, x.k * (sums[:, :, -1:] - sums).exp(), pairs)
    if x.beta is None:
        return made
    return made._replace(starts=x.k * late, overlaps=torch.einsum(product, x.k, x.k, decays))


def entries(place: Place, x: Inputs, made: Prepared) -> tuple[Tensor, Tensor]:
    """(the Fenwick array ``[chunks, H, K, V]``, log-decay of each entry ``[chunks, H, K]``)."""
    found, log = made.k.mT @ x.v, made.chunk_log
    for entry, earlier in place.builds:
        found = found.index_add(0, entry, log[entry].exp().unsqueeze(3) * found[earlier])
        log = log.index_add(0, entry, log[earlier])
    return found, log


def path(place: Place, made: Prepared, entry_log: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """For each level m: (m, chunks, their entries, queries ``[n, H, C, K]`` as seen from the end of the entry)."""
    since = torch.zeros_like(made.chunk_log)
    for m in place.levels:
        chunk, entry = place.reads[m]
        yield m, chunk, entry, made.q[chunk] * since[chunk].exp().unsqueeze(2)
        since = since.index_add(0, chunk, entry_log[entry])


def output(place: Place, x: Inputs, made: Prepared, states: Tensor, entry_log: Tensor) -> Tensor:
    """o ``[chunks, H, C, V]``."""
    o = (made.scores * level_mask(x.scales)) @ x.v
    for m, chunk, entry, queries in path(place, made, entry_log):
        o = o.index_add(0, chunk, scales_of(x, chunk, m).unsqueeze(3) * (queries @ states[entry]))
    return o


def local_grads(x: Inputs, made: Prepared) -> tuple[Tensor, Tensor]:
    """(gradient of the scores ``[chunks, H, C, C]``, dλ of the levels inside a chunk)."""
    outer = (x.do @ x.v.mT).tril()
    return outer * level_mask(x.scales), sums_by_level(x, outer * made.scores)


def query_grads(
    place: Place, x: Inputs, made: Prepared, states: Tensor, entry_log: Tensor, dscales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of the decayed queries ``[chunks, H, C, K]``, dλ, gains ``[tree levels, chunks, H, K]`` by level)."""
    dq, levels, since = torch.zeros_like(made.q), [], torch.zeros_like(made.chunk_log)
    for m, chunk, entry, _ in path(place, made, entry_log):
        product = (x.do[chunk] @ states[entry].mT) * since[chunk].exp().unsqueeze(2)
        share = scales_of(x, chunk, m).unsqueeze(3) * product
        dq = dq.index_add(0, chunk, share)
        dscales = add_level(dscales, x, chunk, m, (product * made.q[chunk]).sum(3))
        levels.append(torch.zeros_like(since).index_add(0, chunk, (share * made.q[chunk]).sum(2)))
        since = since.index_add(0, chunk, entry_log[entry])
    return dq, dscales, torch.stack(levels) if levels else made.chunk_log.new_zeros(0, *made.chunk_log.shape)


def entry_grads(place: Place, x: Inputs, made: Prepared, entry_log: Tensor) -> Tensor:
    """Gradient ``[chunks, H, K, V]`` of each entry, from the chunks of its window."""
    total = made.q.new_zeros(*made.chunk_log.shape, x.v.shape[3])
    for m, chunk, entry, queries in path(place, made, entry_log):
        total = total.index_add(0, entry, queries.mT @ (scales_of(x, chunk, m).unsqueeze(3) * x.do[chunk]))
    return total


def chunk_grads(place: Place, made: Prepared, states: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient ``[chunks, H, K, V]`` of the state at each chunk's end, gains ``[chunks, H, K]`` beyond an entry's window)."""
    upto, beyond = made.chunk_log.cumsum(0), torch.zeros_like(made.chunk_log)
    for m in reversed(place.levels):
        entry, parent = place.parents[m]
        later = (upto[parent] - upto[entry]).exp().unsqueeze(3) * total[parent]
        beyond = beyond.index_add(0, entry, (later * states[entry]).sum(3))
        total = total.index_add(0, entry, later)
    return total, beyond


def key_grads(x: Inputs, made: Prepared, chunk_grads: Tensor) -> tuple[Tensor, Tensor]:
    """(dv ``[chunks, H, C, V]``, gradient of the decayed keys ``[chunks, H, C, K]``)."""
    return made.k @ chunk_grads + (made.scores * level_mask(x.scales)).mT @ x.do, x.v @ chunk_grads.mT


def window_sums(place: Place, levels: Tensor) -> Tensor:
    """``[tree levels, chunks, H, K]``: the gains of the queries after a chunk in the same window of each level."""
    n, first = place.n, place.sequence
    later = (first[:, None] == first[None, :]) & (n[:, None] < n[None, :])
    same = [(later & (n[:, None] >> m == n[None, :] >> m)).to(levels.dtype) for m in place.levels]
    return torch.einsum("mij,mjhk->mihk", torch.stack(same), levels) if same else levels


def in_blocks(x: Tensor) -> Tensor:
    """``[chunks, H, C, K]`` as ``[chunks, H, blocks, tokens of a block, K]``."""
    return x.unflatten(2, (-1, min(SUB, x.shape[2])))


def other_blocks(seen: Tensor, met: Tensor) -> Tensor:
    """``[chunks, H, blocks, K]``: for each block of a chunk, ``seen`` of the later tokens and ``met`` of the earlier ones."""
    seen, met = in_blocks(seen).sum(3), in_blocks(met).sum(3)
    return seen.flip(2).cumsum(2).flip(2) - seen + met.cumsum(2) - met


def around(place: Place, made: Prepared, dq: Tensor, dk: Tensor, windows: Tensor, beyond: Tensor) -> Tensor:
    """``[chunks, H, C / 16, K]``: gains of pairs of two chunks that lie around a block of 16 tokens, or around its chunk."""
    skipped = torch.zeros_like(beyond)
    for m in place.levels:
        chunk, entry = place.reads[m]
        skipped = skipped.index_add(0, chunk, windows[m][chunk] + beyond[entry])
    return other_blocks(made.q * dq, made.k * dk) + skipped.unsqueeze(2)


def gate_grads(
    x: Inputs,
    made: Prepared,
    score_grads: Tensor,
    dq: Tensor,
    dk: Tensor,
    around: Tensor,
    overlap_grads: Tensor | None = None,
    dstarts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dg) ``[chunks, H, C, K]`` of each head; for each gate the pairs of a query from it on and a key before it.

    ``overlap_grads`` and ``dstarts``: of the keys in the place of queries, with the delta rule.
    """
    late, early, decays = made.sums.exp(), (made.sums[:, :, -1:] - made.sums).exp(), _pair_decays(made.sums)
    dq, dk, pairs = dq * late, dk * early, score_grads.unsqueeze(4) * decays
    of_queries, of_keys = dq * x.q, dk * x.k
    shares = pairs * x.q.unsqueeze(3) * x.k.unsqueeze(2)
    dq = dq + (pairs * x.k.unsqueeze(2)).sum(3)
    dk = dk + (pairs * x.q.unsqueeze(3)).sum(2)
    if overlap_grads is not None and dstarts is not None:
        pairs = overlap_grads.unsqueeze(4) * decays
        shares = shares + pairs * x.k.unsqueeze(3) * x.k.unsqueeze(2)
        of_queries = of_queries + dstarts * late * x.k
        dk = dk + dstarts * late + (pairs * x.k.unsqueeze(2)).sum(3) + (pairs * x.k.unsqueeze(3)).sum(2)
    before = shares.cumsum(3) - shares  # of a query with the keys before a gate
    inside = torch.einsum("nhtrk,tr->nhrk", before, score_grads.new_ones(score_grads.shape[2:]).tril())
    seen, met = in_blocks(of_queries), in_blocks(of_keys)
    beside = seen.flip(3).cumsum(3).flip(3) + met.cumsum(3) - met
    gain = inside + (beside + around.unsqueeze(3)).flatten(2, 3)
    return dq, dk, torch.where(x.g > GATE_FLOOR, gain, 0.0)


def trace(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor,
    do: Tensor,
    scale: float = 1.0,
    lengths: tuple[int, ...] | None = None,
    chunk_size: int = 64,
) -> tuple[Place, Inputs, dict[str, Any]]:
    """As ``decay.trace``."""
    place = Place(lengths or (q.shape[1],) * q.shape[0], chunk_size, q.device)
    x = cut(place, q, k, v, g, level_scales, None, do, scale)
    prepared = scores(x)
    states, log = entries(place, x, prepared)
    o = output(place, x, prepared, states, log)
    score_grads, local_scales = local_grads(x, prepared)
    query, dscales, levels = query_grads(place, x, prepared, states, log, local_scales)
    of_entries = entry_grads(place, x, prepared, log)
    ends, beyond = chunk_grads(place, prepared, states, of_entries)
    dv, key = key_grads(x, prepared, ends)
    windows = window_sums(place, levels)
    rest = around(place, prepared, query, key, windows, beyond)
    dq, dk, dg = gate_grads(x, prepared, score_grads, query, key, rest)
    made: dict[str, Any] = {f"prepared.{name}": y for name, y in prepared._asdict().items()}
    made |= {"entries": states, "entry_log": log, "score_grads": score_grads, "local_scales": local_scales * scale}
    made |= {"grads.q": query, "levels": levels, "entry_grads": of_entries, "chunk_grads": ends, "beyond": beyond}
    made |= {"grads.k": key, "windows": windows, "around": rest}
    results = {"o": place.tokens(o, v), "dq": place.summed(dq, q), "dk": place.summed(dk, k)}
    results |= {"dv": place.tokens(dv, v), "dg": place.tokens(dg, v), "dlevel_scales": place.tokens(dscales * scale, v)}
    return place, x, made | results
