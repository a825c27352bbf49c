"""PLACE: which chunks, entries and octets a batch of sequences has, as tables of integers, and its tensors cut into chunks.

Chunks are those of all sequences; the chunks of a sequence follow each other. Entry e of a sequence stands at its chunk
e - 1. An *octet* is eight chunks in a row. A *unit* of tier 0 is a chunk, and of tier t a whole octet of tier t - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglinear.fenwick import lowbit, query_path
from loglinear.reference.dense import level_matrix

OCTET, LOG_OCTET = 8, 3
GATE_FLOOR = -128.0  # exp has underflowed to zero in float32


class Tier(NamedTuple):
    """Octets of one tier. unit: ``[octets, 8]``, the unit's index in its tier, -1 where there is none. chunk: ``[octets, 8]``,
    the chunk of the entry that ends with the unit. whole: ``[octets]``, whether all eight units are there."""

    unit: Tensor
    chunk: Tensor
    whole: Tensor


class Place:
    """The tables of sequences of these lengths, in chunks of ``chunk_size`` tokens.

    Attributes:
        chunks: number of chunks. n, chunks, sequence: ``[chunks]``, the chunk's number in its sequence, the number of the
            sequence's chunks, and the sequence's own.
        token: ``[B·T]``, the slot of each token among the chunks·C slots of the chunks.
        builds: for each level m the pairs (entry, entry that it folds in), as chunks. parents: for each level m the pairs
            (entry of 2^m chunks, next entry on its update path), as chunks.
        reads: for each level m the pairs (chunk, entry on its path), as chunks.
        octet: ``[chunks]``, the octet of each chunk. octet_end: the pairs (whole octet, its last chunk), as two tensors.
        tiers: the tree from its chunks up to the tier in which every sequence is one octet.
        inner: for each level m below an octet the triples (chunk, entry, slot) of the paths inside octets; inner_slots of them.
        outer: for each place j on a path of octets, nearest entry first, the triples (octet, entry, slot); path_slots of them.
        before: the same for the chunks of these octets, (chunk, entry, slot, level m of the entry).
    """

    def __init__(self, lengths: tuple[int, ...], chunk_size: int, device: torch.device | None = None) -> None:
        self.chunk_size = chunk_size
        counts = [-(-length // chunk_size) for length in lengths]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        self.all_chunks = sum(counts)

        def numbers(values: list[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        def pairs(values: list[tuple[int, ...]], width: int = 2) -> tuple[Tensor, ...]:
            return numbers(values).reshape(-1, width).mT.contiguous().unbind(0)

        ordered = list(zip(starts, counts))
        self.n = numbers([n for count in counts for n in range(count)])
        self.chunks = numbers([count for count in counts for _ in range(count)])
        self.sequence = numbers([i for i, count in enumerate(counts) for _ in range(count)])
        self.token = numbers([start * chunk_size + t for start, length in zip(starts, lengths) for t in range(length)])
        self.levels = range((max(counts, default=0)).bit_length())
        self.builds: list[tuple[Tensor, ...]] = []
        self.parents: list[tuple[Tensor, ...]] = []
        self.reads: list[tuple[Tensor, ...]] = []
        for m in self.levels:
            step = 1 << m
            ends = [(s, e, c) for s, c in ordered for e in range(step, c + 1, step)]
            self.builds.append(pairs([(s + e - 1, s + e - step - 1) for s, e, _ in ends if e // step % 2 == 0]))
            odd = [(s, e, c) for s, e, c in ends if e // step % 2 == 1]
            self.parents.append(pairs([(s + e - 1, s + e + step - 1) for s, e, c in odd if e + step <= c]))
            self.reads.append(
                pairs([(s + n, s + (n >> m << m) - 1) for s, c in ordered for n in range(c) if n >> m & 1])
            )
        self._groups(ordered, numbers, pairs)

    def _groups(self, ordered: list[tuple[int, int]], numbers: Callable[..., Any], pairs: Callable[..., Any]) -> None:
        self.tiers: list[Tier] = []
        below, span = [s for s, _ in ordered], 1
        while True:
            first: list[int] = []
            units: list[list[int]] = []
            all_chunks: list[list[int]] = []
            for (start, count), base in zip(ordered, below):
                first.append(len(units))
                whole = count // span if span > 1 else count
                for octet in range(-(-count // (span * OCTET))):
                    local = [octet * OCTET + c for c in range(OCTET)]
                    units.append([base + i if i < whole else -1 for i in local])
                    all_chunks.append([start + (i + 1) * span - 1 if i < whole else 0 for i in local])
            unit = numbers(units).reshape(-1, OCTET)
            self.tiers.append(Tier(unit, numbers(all_chunks).reshape(-1, OCTET), (unit >= 0).all(1)))
            if span == 1:
                octet0 = first
            span, below = span * OCTET, first
            if all(count <= span for _, count in ordered):
                break
        bases = [(s, c, g) for (s, c), g in zip(ordered, octet0)]
        self.octet = numbers([g + n // OCTET for s, c, g in bases for n in range(c)])
        self.octet_end = pairs([(g + i, s + (i + 1) * OCTET - 1) for s, c, g in bases for i in range(c // OCTET)])
        self.inner: list[tuple[Tensor, ...]] = []
        self.path_slots = 0
        for m in range(LOG_OCTET):
            found = []
            for start, count in ordered:
                for n in range(count):
                    if n >> m & 1:
                        path = start + start // 2 + n // OCTET * 12 + sum(i.bit_count() for i in range(n % OCTET))
                        slot = path + (n & ((1 << m) - 1)).bit_count()
                        found.append((start + n, start + (n >> m << m) - 1, slot))
            self.inner.append(pairs(found, 3))
        self.inner_slots = self.all_chunks * 3 // 2
        paths: dict[int, list[tuple[int, ...]]] = {}
        chunks: dict[int, list[tuple[int, ...]]] = {}
        for start, count, first_octet in bases:
            for octet in range(-(-count // OCTET)):
                for j, e in enumerate(query_path(octet)):
                    entry, m = start + e * OCTET - 1, LOG_OCTET + lowbit(e).bit_length() - 1
                    paths.setdefault(j, []).append((first_octet + octet, entry, self.path_slots))
                    own = range(start + octet * OCTET, start + min(count, (octet + 1) * OCTET))
                    chunks.setdefault(j, []).extend((chunk, entry, self.path_slots, m) for chunk in own)
                    self.path_slots += 1
        self.outer = [pairs(found, 3) for found in paths.values()]
        self.before = [pairs(found, 4) for found in chunks.values()]

    def chunked(self, x: Tensor) -> Tensor:
        """``[B, T, heads, …]`` -> ``[chunks, heads, C, …]``, zeros where there is no token."""
        flat = x.reshape(-1, *x.shape[2:])
        slots = flat.new_zeros(self.all_chunks * self.chunk_size, *x.shape[2:]).index_copy(0, self.token, flat)
        return slots.unflatten(0, (self.all_chunks, self.chunk_size)).transpose(1, 2)

    def tokens(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse, of the batch and length of ``like``."""
        return x.transpose(1, 2).flatten(0, 1)[self.token].reshape(*like.shape[:2], *x.shape[1:2], *x.shape[3:])

    def summed(self, x: Tensor, like: Tensor) -> Tensor:
        """``tokens``, with the heads that share one of ``like`` added up."""
        return self.tokens(x, like).unflatten(2, (like.shape[2], -1)).sum(3)


class Inputs(NamedTuple):
    """The tensors of a call cut into chunks, with q and k for each value head: q, k ``[chunks, H, C, K]``, v and do
    ``[chunks, H, C, V]``, g (natural log, from GATE_FLOOR on) and beta ``[chunks, H, C]``, scales: λ times the factor of o,
    ``[chunks, H, C, L]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    scales: Tensor
    beta: Tensor = None  # type: ignore[assignment]
    do: Tensor = None  # type: ignore[assignment]


def cut(
    place: Place,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    level_scales: Tensor,
    beta: Tensor | None = None,
    do: Tensor | None = None,
    scale: float = 1.0,
) -> Inputs:
    """The inputs of a public op ``[B, T, heads, …]`` in chunks."""
    share = v.shape[2] // q.shape[2]
    queries, keys = (place.chunked(x.repeat_interleave(share, 2)) for x in (q, k))
    gate = torch.zeros_like(v[..., 0]) if g is None else g.clamp(min=GATE_FLOOR)
    scales = place.chunked(level_scales * scale)
    rate, gradient = (None if x is None else place.chunked(x) for x in (beta, do))
    return Inputs(queries, keys, place.chunked(v), place.chunked(gate), scales, rate, gradient)  # type: ignore[arg-type]


def levels_of(x: Inputs) -> Tensor:
    """Levels inside a chunk ``[C, C]``, the last of λ shared by all that follow."""
    return level_matrix(x.scales.shape[2], device=x.scales.device).clamp(max=x.scales.shape[3] - 1)


def level_of_entry(x: Inputs, m: int | Tensor) -> Tensor:
    """The level of λ at which an entry of 2^m chunks is seen."""
    return (torch.as_tensor(m, device=x.scales.device) + x.scales.shape[2].bit_length()).clamp(
        max=x.scales.shape[3] - 1
    )


def scales_of(x: Inputs, chunk: Tensor, m: int | Tensor) -> Tensor:
    """λ ``[n, H, C]`` of n chunks towards entries of 2^m chunks; m for all of them or for each."""
    level = level_of_entry(x, m).expand(len(chunk))[:, None, None, None]
    return x.scales[chunk].gather(3, level.expand(-1, *x.scales.shape[1:3], 1)).squeeze(3)


def add_level(dscales: Tensor, x: Inputs, chunk: Tensor, m: int | Tensor, share: Tensor) -> Tensor:
    """``dscales [chunks, H, C, L]`` plus ``share [n, H, C]``, the gradient of ``scales_of``."""
    at_level = torch.nn.functional.one_hot(level_of_entry(x, m).expand(len(chunk)), x.scales.shape[3])
    return dscales.index_add(0, chunk, share.unsqueeze(3) * at_level[:, None, None].to(share.dtype))


def sums_by_level(x: Inputs, pairs: Tensor) -> Tensor:
    """Row sums ``[chunks, H, C, L]`` of ``pairs [chunks, H, C, C]`` over the columns of each level inside a chunk."""
    index = levels_of(x).expand_as(pairs)
    return torch.zeros_like(x.scales).scatter_add(3, index, pairs.tril())


def pair_decays(sums: Tensor) -> Tensor:
    """Decay ``[…, C, C]`` from each token (column) to a later one (row) of its chunk, zero above the diagonal."""
    return (sums[..., :, None] - sums[..., None, :]).clamp(max=0.0).exp().tril()
