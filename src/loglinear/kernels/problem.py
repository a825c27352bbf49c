"""What the host knows before it launches: sizes, strides and, for packed sequences, the table of chunks.

Special about this file: nothing here waits for the device. For packed sequences the number of chunks is only bounded
(``T // C + sequences``); programs past the last chunk see a sequence of -1 tokens and return.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loglinear.kernels.common import GROUP
from loglinear.kernels.tuning import DeltaRuleConfig, ScalarGateConfig


def cdiv(x: int, y: int) -> int:
    """``ceil(x / y)``; Triton's own goes through the compiler's wrappers and takes longer than some launches."""
    return -(-x // y)


def padded(width: int) -> int:
    """Width of a tile that holds a whole row: a power of two, at least 16."""
    return max(1 << (width - 1).bit_length(), 16)


def token_rows(x: Tensor) -> Tensor:
    """x ``[B, T, heads, width]`` or ``[B, T, heads]`` such that token b*T + t begins at (b*T + t) * x.stride(1)."""
    if x.is_contiguous():
        return x
    inner = x.shape[2:]
    packed = all(x.stride(i + 2) == inner[i + 1 :].numel() for i in range(len(inner)))
    return x if packed and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)) else x.contiguous()


@dataclass(frozen=True)
class Tier:
    """Groups of ``GROUP`` units in a row. Units are the chunks in tier 0, the groups of the tier below in every other.

    Unit i (1-based) of a sequence in tier t ends where entry ``i << 3 t`` of its Fenwick array does; in tiers above 0 only
    whole units have maps, ``chunks >> 3 t`` of them. ``units`` and ``groups`` count those of the whole batch (at most, if
    packed), ``sequence_units`` and ``sequence_groups`` those of one sequence. ``table`` is for ``common.locate``: that of
    the problem in tier 0; above, its first token is a first unit, and its tokens are chunks if packed.
    """

    units: int
    groups: int
    sequence_units: int
    sequence_groups: int
    unit_sequence: Tensor | None
    group_sequence: Tensor | None
    table: tuple


@dataclass(frozen=True)
class Problem:
    """Sizes of one call, and the tables that place its chunks.

    ``unit_sequence`` maps rows, then groups, to their sequence (-1: none); ``sequences [n, 5]`` holds per sequence its
    first token, tokens, first row, first group and the absolute number of its first chunk. Both are None if not packed.
    """

    batch: int
    length: int
    heads: int
    groups: int
    key_width: int
    value_width: int
    levels: int
    rows: int
    row_groups: int
    chunks: int
    config: ScalarGateConfig | DeltaRuleConfig
    unit_sequence: Tensor | None
    sequences: Tensor | None

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def packed(self) -> bool:
        return self.sequences is not None

    @property
    def chunk_groups(self) -> int:
        """Groups of chunks in one sequence, at most."""
        return cdiv(self.chunks, GROUP.value)

    @property
    def tree_levels(self) -> int:
        """Levels of the tree over chunks, at least 1: the widest entry that a query reads has 2^(this - 1) chunks."""
        return max((self.chunks - 1).bit_length(), 1)

    @property
    def high_levels(self) -> int:
        """Levels of the tree over groups: those of ``tree_levels`` above a group."""
        return (self.chunk_groups - 1).bit_length()

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.groups

    @property
    def table(self) -> tuple:
        """The arguments by which a kernel finds its sequence: sequences, T, N, NG."""
        return self.sequences, self.length, self.chunks, self.chunk_groups

    @property
    def row_sequence(self) -> Tensor | None:
        return None if self.unit_sequence is None else self.unit_sequence[: self.rows]

    @property
    def group_sequence(self) -> Tensor | None:
        return None if self.unit_sequence is None else self.unit_sequence[self.rows :]

    @cached_property
    def tiers(self) -> tuple[Tier, ...]:
        """The tree from its chunks up to the tier in which a sequence is one group."""
        sizes = self.rows, self.row_groups, self.chunks, self.chunk_groups
        tiers = [Tier(*sizes, self.row_sequence, self.group_sequence, self.table)]
        while tiers[-1].sequence_groups > 1:
            tiers.append(self._tier_above(tiers[-1], GROUP.value ** len(tiers)))
        return tuple(tiers)

    def _tier_above(self, below: Tier, size: int) -> Tier:
        """The tier whose units are the groups of ``below``, each of ``size`` chunks."""
        groups = cdiv(below.sequence_groups, GROUP.value)
        table = below.sequence_groups, self.chunks, groups
        if self.sequences is None:
            sizes = below.groups, self.batch * groups, below.sequence_groups, groups
            return Tier(*sizes, None, None, (None, *table))
        chunks = (self.sequences[:, 1] + self.config.chunk - 1) // self.config.chunk
        count = (chunks + size * GROUP.value - 1) // (size * GROUP.value)
        end = count.cumsum(0)
        columns = (below.table[0][:, 3], chunks, self.sequences[:, 2], end - count, torch.zeros_like(chunks))
        sequences = torch.stack(columns, dim=1).to(torch.int32).contiguous()
        total = below.groups // GROUP.value + chunks.numel()
        place = places(end, total).to(torch.int32)
        sizes = below.groups, total, below.sequence_groups, groups
        return Tier(*sizes, below.group_sequence, place, (sequences, *table))

    @property
    def path_entries(self) -> int:
        """Entries on the query paths of all chunks of one sequence; if packed, a bound for all sequences together."""
        return set_bits_before(self.rows if self.packed else self.chunks)

    @cached_property
    def path_starts(self) -> Tensor | None:
        """``[n]`` number of path entries of all sequences before each; None if not packed: all have ``path_entries``."""
        if self.sequences is None:
            return None
        chunks = (self.sequences[:, 1] + self.config.chunk - 1) // self.config.chunk
        entries = torch.zeros_like(chunks)
        for bit in range(self.chunks.bit_length()):
            entries += (chunks >> (bit + 1) << bit) + ((chunks & ((2 << bit) - 1)) - (1 << bit)).clamp(min=0)
        return (entries.cumsum(0) - entries).to(torch.int32)


def set_bits_before(n: int) -> int:
    """Bits set in 0, 1, … n - 1 together: the lengths of all query paths of n chunks."""
    bits = range(n.bit_length())
    return sum((n >> (bit + 1) << bit) + max((n & ((2 << bit) - 1)) - (1 << bit), 0) for bit in bits)


def describe(
    q: Tensor,
    v: Tensor,
    level_scales: Tensor,
    cu_seqlens: Tensor | None,
    config: ScalarGateConfig | DeltaRuleConfig,
) -> Problem:
    """The problem of one call. Shapes are the caller's business; ``cu_seqlens [n+1]`` stays on the device."""
    batch, length, groups, key_width = q.shape
    chunk = config.chunk
    if cu_seqlens is None:
        chunks = cdiv(length, chunk)
        rows, row_groups = batch * chunks, batch * cdiv(chunks, GROUP.value)
        unit_sequence = sequences = None
    else:
        count = cu_seqlens.numel() - 1
        chunks = cdiv(length, chunk)
        rows = length // chunk + count
        row_groups = rows // GROUP.value + count
        unit_sequence, sequences = packed_tables(cu_seqlens, rows, row_groups, chunk)
    return Problem(
        batch=batch,
        length=length,
        heads=v.shape[2],
        groups=groups,
        key_width=key_width,
        value_width=v.shape[3],
        levels=level_scales.shape[-1],
        rows=rows,
        row_groups=row_groups,
        chunks=chunks,
        config=config,
        unit_sequence=unit_sequence,
        sequences=sequences,
    )


def packed_tables(cu_seqlens: Tensor, rows: int, row_groups: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Tables of ``Problem`` for packed sequences, computed on the device of ``cu_seqlens``."""
    bounds = cu_seqlens.to(torch.int64)
    length = bounds[1:] - bounds[:-1]
    chunks = (length + chunk - 1) // chunk
    groups = (chunks + GROUP.value - 1) // GROUP.value
    row_end, group_end = chunks.cumsum(0), groups.cumsum(0)
    columns = (bounds[:-1], length, row_end - chunks, group_end - groups, torch.zeros_like(length))
    sequences = torch.stack(columns, dim=1).to(torch.int32).contiguous()
    units = [places(row_end, rows), places(group_end, row_groups)]
    return torch.cat(units).to(torch.int32), sequences


def places(end: Tensor, count: int) -> Tensor:
    """The sequence of each of ``count`` units, -1 past the last; those of sequence i end before ``end[i]``."""
    index = torch.searchsorted(end, torch.arange(count, device=end.device), right=True)
    return torch.where(index < end.numel(), index, -1)
