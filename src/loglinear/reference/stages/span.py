"""SPAN: output, query side and key side of the scalar gate with spans of four chunks, as ``kernels/decay/span`` computes them.

Queries attend to their span by products of a factor of the query and a factor of the key, one pair for each level. They
read entries of four chunks and more. All other stages are those of ``decay.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loglinear.reference.stages.decay import States, path
from loglinear.reference.stages.place import Inputs, Place, add_level, levels_of, scales_of

BLOCKS = 4  # sub-blocks of a chunk, and chunks of a span
SPAN_LEVEL = 2  # entries of 2^2 chunks are the shortest that are read


def chunk_decays(sums: Tensor) -> Tensor:
    """Decay inside a chunk ``[chunks, H, C, C]``, zero above the diagonal; outside sub-blocks a product of two factors."""
    C = sums.shape[2]
    size = C // BLOCKS
    block = torch.arange(C, device=sums.device) // size
    ends = sums[..., size - 1 :: size]  # of the sub-blocks
    rows = (
        (sums[..., :, None] - ends[..., None, :]).clamp(max=0.0).exp()[..., block]
    )  # [t, s]: from the end of s's block
    columns = (ends[..., block] - sums).exp()
    near = (sums[..., :, None] - sums[..., None, :]).clamp(max=0.0).exp()
    return torch.where(block[:, None] == block[None, :], near, rows * columns[..., None, :]).tril()


def turned_decays(sums: Tensor) -> Tensor:
    """The same, but the two factors meet where the sub-block of the query begins."""
    C = sums.shape[2]
    size = C // BLOCKS
    block = torch.arange(C, device=sums.device) // size
    start = sums[..., (block * size - 1).clamp(min=0)]
    rows = (sums - start).exp()
    columns = (start[..., :, None] - sums[..., None, :]).clamp(max=0.0).exp()
    near = (sums[..., :, None] - sums[..., None, :]).clamp(max=0.0).exp()
    return torch.where(block[:, None] == block[None, :], near, rows[..., None] * columns).tril()


def chunk_scales(x: Inputs) -> Tensor:
    """λ inside a chunk ``[chunks, H, C, C]``."""
    C = x.scales.shape[2]
    return torch.gather(x.scales, 3, levels_of(x).expand(*x.scales.shape[:3], C))


def earlier_weights(states: States, level: int, chunk: Tensor, earlier: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """(row factors, column factors) ``[n, H, C]`` without λ, of chunks and earlier chunks of their spans at a level 0 or 1.

    The two meet where the part of the span ends that the entry of this level covers.
    """
    odd = (place.n[chunk] & 1 if level == 1 else torch.zeros_like(chunk)).to(states.sums.dtype)
    since = states.chunk_log[(chunk - 1).clamp(min=0)] * odd[:, None]
    first = (level == 1) & (place.n[earlier] & 1 == 0)
    to_meet = torch.where(first[:, None], states.chunk_log[(earlier + 1).clamp(max=len(place.n) - 1)], 0.0)
    rows = (states.sums[chunk] + since[..., None]).exp()
    columns = (states.chunk_log[earlier].unsqueeze(2) - states.sums[earlier] + to_meet.unsqueeze(2)).exp()
    return rows, columns


def pairs_of_spans(place: Place) -> list[tuple[int, Tensor, Tensor]]:
    """(level, chunks, earlier chunks) of all pairs of two chunks in one span, by the level of the tree at which they meet."""
    chunk = torch.arange(place.all_chunks, device=place.n.device)
    odd, upper = chunk[place.n & 1 == 1], chunk[place.n & 2 == 2]
    start = upper - (place.n[upper] & 3)
    return [(0, odd, odd - 1), (1, upper, start), (1, upper, start + 1)]


def output(place: Place, x: Inputs, states: States) -> Tensor:
    """o ``[chunks, H, C, V]``: the span, then the entries before it."""
    o = ((x.q @ x.k.mT) * chunk_decays(states.sums) * chunk_scales(x)) @ x.v
    for level, chunk, earlier in pairs_of_spans(place):
        rows, columns = earlier_weights(states, level, chunk, earlier, place)
        weights = (scales_of(x, chunk, level) * rows).unsqueeze(3) * columns.unsqueeze(2)
        o = o.index_add(0, chunk, ((x.q[chunk] @ x.k[earlier].mT) * weights) @ x.v[earlier])
    for m, chunk, entry, decay in path(place, states, place.levels[SPAN_LEVEL:]):
        weight = (scales_of(x, chunk, m) * decay).unsqueeze(3)
        o = o.index_add(0, chunk, weight * (x.q[chunk] @ states.entries[entry]))
    return o


def query_side(
    place: Place, x: Inputs, states: States, score_grads: Tensor, dscales: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of ``decay.query_grads``: a gradient is a factor of the query times a product. The gradient of λ is a sum of
    dP times scores, or of dO times the product of q and an entry.
    """
    dq, levels = score_grads @ x.k, states.chunk_log.new_zeros(len(place.levels), *states.chunk_log.shape)
    products = []
    for level, chunk, earlier in pairs_of_spans(place):
        decay, columns = earlier_weights(states, level, chunk, earlier, place)
        grads, keys = (x.do[chunk] @ x.v[earlier].mT) * columns.unsqueeze(2), x.k[earlier]
        products.append((level, chunk, decay, grads @ keys, (grads * (x.q[chunk] @ keys.mT)).sum(3)))
    for m, chunk, entry, decay in path(place, states, place.levels[SPAN_LEVEL:]):
        do, entries = x.do[chunk], states.entries[entry]
        products.append((m, chunk, decay, do @ entries.mT, (do * (x.q[chunk] @ entries)).sum(3)))
    for m, chunk, decay, product, found in products:
        if len(chunk) == 0:
            continue
        scale, gain = scales_of(x, chunk, m), found * decay
        dq = dq.index_add(0, chunk, (scale * decay).unsqueeze(3) * product)
        dscales = add_level(dscales, x, chunk, m, gain)
        rows = rows.index_add(0, chunk, gain * scale)
        levels[m] = levels[m].index_add(0, chunk, (gain * scale).sum(2))
    return dq, dscales, rows, levels


def key_side(
    place: Place, x: Inputs, states: States, ends: Tensor, score_grads: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dk ``[chunks, H, C, K]`` of each head, dv, gains of the columns, completed, and of the chunks, those past their tile).

    ``ends`` is ``decay.chunk_grads``, read at the end of every second chunk. The queries of the second chunk of a tile attend
    to the keys of the first directly.
    """
    total, log = torch.zeros_like(ends), states.chunk_log.clone()
    second = (place.n & 1 == 1).nonzero().squeeze(1)
    for chunk in (second, second - 1):
        total = total.index_copy(0, chunk, ends[second])
    log = log.index_add(0, second - 1, log[second])
    to_end = (log.unsqueeze(2) - states.sums).exp().unsqueeze(3)
    dk, later = score_grads.mT @ x.q + (x.v * to_end) @ total.mT, (x.k @ total) * to_end
    passed = (later * x.v).sum((2, 3))
    rows, factors = earlier_weights(states, 0, second, second - 1, place)
    weights = (scales_of(x, second, 0) * rows).unsqueeze(3) * factors.unsqueeze(2)
    do, q = x.do[second], x.q[second]
    later = later.index_add(0, second - 1, ((q @ x.k[second - 1].mT) * weights).mT @ do)
    dk = dk.index_add(0, second - 1, ((do @ x.v[second - 1].mT) * weights).mT @ q)
    gain = (later * x.v).sum(3)
    own = (x.q @ x.k.mT) * turned_decays(states.sums) * chunk_scales(x)
    return dk, later + own.mT @ x.do, columns + gain, gain.sum(2), passed


def pair_beyond(place: Place, passed: Tensor, levels: Tensor) -> Tensor:
    """Gains ``[chunks, H]`` beyond the window of entries of two chunks: what passes their end, without their readers'."""
    chunk, entry = place.reads[1]
    total = torch.zeros_like(passed).index_copy(0, entry, passed[entry] + passed[entry - 1])
    return total.index_add(0, entry, -levels[1][chunk])
