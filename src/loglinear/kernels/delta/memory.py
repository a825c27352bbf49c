"""MEMORY: the tensors that the forward pass keeps for the backward, and the number of heads in a slice of the backward pass.

The module is arithmetic on the host, before any allocation. Kept maps and slices of many heads both make the backward pass
faster, and both cost memory. The bytes of inputs, outputs and their gradients set the bound on this memory.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from loglinear.kernels.channel.forward import Prepared, prepared_shapes
from loglinear.kernels.delta.octet_maps import PREFIXES
from loglinear.kernels.delta.score_grads import PLANES
from loglinear.kernels.tree.problem import Problem, cdiv

SHARE = 2.0  # most bytes of maps and intermediates together, per byte of inputs, output and their gradients
KEPT_SHARE = 1.4  # the same of maps that are kept from the forward pass
PREPARED = len(Prepared._fields) - 1  # tensors of a gate per channel among the maps, beside the logs of chunks
UNSLICED = 512 << 20  # bytes of intermediates that are always allowed


class ChunkMaps(NamedTuple):
    """The first of ``Maps``, as a bundle for kernels; None where a kernel does not read one. The last three are those of
    ``channel.forward.Prepared``, with a gate per channel.
    """

    sums: Tensor
    chunk_log: Tensor
    solve: Tensor
    writes: Tensor | None
    entries: Tensor | None
    scores: Tensor | None = None
    starts: Tensor | None = None
    overlaps: Tensor | None = None


class Maps(NamedTuple):
    """The facts about the chunks that depend on no query. ``low`` is v's dtype; logs are in base 2.

    A *map* of a span is one matrix ``[A | S]`` ``[K, K+V]``: a state X that comes before the span leaves it as ``A X + S``.

    sums: ``[H, planes, B*T]`` float32, cumulative log-decay inside each chunk; two planes, value and rounding error, for
        float32 inputs; NaN for a token that is not finite. chunk_log: ``[chunks, H]`` float32. With a gate per channel there
        are no sums, and chunk_log is ``[chunks, H, K]``.
    solve: ``[chunks, H, C, C]`` low, ``T = (I + diag(β) Z)⁻¹ diag(β)``, lower triangular, zero for tokens past the end.
    writes: ``[chunks, H, C, K+V]`` low, ``[W | U]``.
    entries: ``[chunks, H, K, K+V]`` low, the Fenwick array: entry e of a sequence at chunk0 + e - 1. The entry of all chunks of
        the highest tier's octet is there too, if the octet is whole; no query reads it. Entries of single chunks are
        undefined (see leaf.py), except, beside prefixes, those of an octet's unit 0 and, before a unit 5, of unit 4.
    octets: one ``[octets, H, K, K+V]`` low per tier, the map of each whole octet; none for the highest tier.
    prefixes: one ``[4 octets, H, K, K+V]`` low per tier: the map of the units of an octet before each unit, where it is
        neither ``[I | 0]`` nor an entry (``octet_maps.prefix_slot``); None if they were not asked for.
    """

    sums: Tensor
    chunk_log: Tensor
    solve: Tensor
    writes: Tensor
    entries: Tensor
    octets: tuple[Tensor, ...]
    prefixes: tuple[Tensor, ...]
    prepared: Prepared | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors in one tuple. ``Maps.of`` undoes this."""
        made = () if self.prepared is None else self.prepared[1:]
        return *self[:5], *self.octets, *self.prefixes, *made  # type: ignore[return-value]

    @staticmethod
    def of(tensors: tuple[Tensor, ...], channels: bool) -> Maps:
        """Maps with prefixes, from their ``tensors``; ``channels``: those of a gate per channel."""
        made = PREPARED if channels else 0
        tiers = (len(tensors) - made - 4) // 2
        first, rest, last = tensors[:5], tensors[5 : len(tensors) - made], tensors[len(tensors) - made :]
        prepared = Prepared(tensors[1], *last) if channels else None
        return Maps(*first, rest[: tiers - 1], rest[tiers - 1 :], prepared)  # type: ignore[call-arg]

    @property
    def chunks(self) -> ChunkMaps:
        made = self.prepared
        return ChunkMaps(*self[:5], *(() if made is None else (made.scores, made.starts, made.overlaps)))

    @property
    def heads(self) -> int:
        """Heads side by side in memory: more than the heads of these maps, if the maps are a slice."""
        return self.writes.stride(0) // self.writes.stride(1)

    def part(self, first: int, count: int) -> Maps:
        """The maps of ``count`` heads, as views."""
        heads = slice(first, first + count)
        own = (x[:, heads] for x in self[1:5])
        rest = (tuple(x[:, heads] for x in maps) for maps in (self.octets, self.prefixes))
        made = self.prepared
        prepared = None if made is None else Prepared(*(x[:, heads] for x in made))  # type: ignore[index]
        return Maps(self.sums[heads], *own, *rest, prepared)  # type: ignore[arg-type, misc]


def map_shapes(problem: Problem, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of ``Maps.tensors``, with prefixes, where v is of ``dtype``. The first two are the logs."""
    H, K, V = problem.heads, problem.key_width, problem.value_width
    C, all_chunks = problem.config.chunk, problem.all_chunks
    octets = [total for total, _ in problem.tier_octets]
    maps = all_chunks, *octets[:-1], *(PREFIXES.value * count for count in octets)
    shapes = [(all_chunks, H, C, C), (all_chunks, H, C, K + V), *((count, H, K, K + V) for count in maps)]
    logs = [(H, 2 if dtype == torch.float32 else 1, problem.tokens), (all_chunks, H)]
    prepared = []
    if problem.channels:
        logs = [(H, 0, problem.tokens), (all_chunks, H, K)]
        prepared = prepared_shapes(problem, dtype, delta=True)[1:]
    return [*((shape, torch.float32) for shape in logs), *((shape, dtype) for shape in shapes), *prepared]


def map_elements(problem: Problem) -> int:
    """Elements of 16 bits of all ``Maps`` of one head, with prefixes. The first two logs are left out."""
    shapes = map_shapes(problem, torch.bfloat16)[2:]
    return sum(shape[0] * prod(shape[2:]) * (dtype.itemsize // 2) for shape, dtype in shapes)


def given_bytes(problem: Problem, size: int) -> int:
    """Bytes of q, k, v, o and their gradients, of ``size`` bytes an element, and of a gate per channel and its, in float32."""
    widths = problem.groups * problem.key_width + problem.heads * problem.value_width
    gates = problem.heads * problem.key_width * 2 * 4 if problem.channels else 0
    return problem.tokens * (4 * widths * size + gates)


def keeps_maps(problem: Problem, size: int) -> bool:
    """Whether a forward pass leaves its maps for the backward: all of them or none."""
    kept = map_elements(problem) * problem.heads * size
    return problem.all_chunks > 0 and kept <= KEPT_SHARE * given_bytes(problem, size)


def heads_at_a_time(problem: Problem, size: int, kept: bool) -> int:
    """Heads of a slice: whole groups or a part of one. ``kept``: maps are there.

    As many that the intermediates fit into the memory that is left: a slice begins when the one before it has ended.
    Heads do not meet but in the sums over a group, which are in a fixed order, so this changes no bit.
    """
    H, K, V, C = problem.heads, problem.key_width, problem.value_width, problem.config.chunk
    maps = map_elements(problem)
    # The tensors of the paths are freed before the scores and the shares of dk are allocated.
    paths = problem.all_chunks * 3 * C * K + 2 * problem.path_slots * K * (K + V)
    later = problem.all_chunks * C * (2 * K + PLANES.value * C)
    elements = cdiv(problem.all_chunks * 3, 2) * K * (K + V) + problem.all_chunks * C * K + max(paths, later)
    left = SHARE * given_bytes(problem, size) - (maps * H * size if kept else 0)
    allowed = max(left, UNSLICED) // max((elements + (0 if kept else maps)) * size, 1)
    per_group = problem.heads_per_group
    fitting = [n for n in range(1, H + 1) if H % n == 0 and (n % per_group == 0 or per_group % n == 0)]
    return max((n for n in fitting if n <= allowed), default=1)
