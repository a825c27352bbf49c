"""The sizes, the strides and, for packed sequences, the table of chunks that the host works out before a launch.

Nothing here waits for the device. For packed sequences the host knows only a bound on the number of chunks
(``T // C + sequences``). Programs past the last chunk see a sequence of -1 tokens and return.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loglinear.kernels.tree.bundles import Sizes, Table, constants
from loglinear.kernels.tree.place import OCTET
from loglinear.kernels.tuning import DeltaRuleConfig, ScalarGateConfig
from loglinear.state import CHUNK_SIZE


def cdiv(x: int, y: int) -> int:
    """``ceil(x / y)``; Triton's own goes through the compiler's wrappers and takes longer than some launches."""
    return -(-x // y)


def padded(width: int) -> int:
    """Width of a tile that holds a whole row: a power of two, at least 16."""
    return max(1 << (width - 1).bit_length(), 16)


def token_rows(x: Tensor) -> Tensor:
    """x ``[B, T, ...]`` of one or two inner axes, such that token b*T + t begins at (b*T + t) * x.stride(1)."""
    if x.is_contiguous() and x.shape[1] != 1:  # contiguous says nothing of the strides of an axis of size 1
        return x
    inner = x.shape[2:]
    packed = all(x.stride(i + 2) == inner[i + 1 :].numel() for i in range(len(inner)))
    if packed and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Tier:
    """Octets of ``OCTET`` units in a row. The units of tier 0 are the chunks, of a higher tier the octets of the tier below.
    Unit i (1-based) of a sequence in tier t ends where entry ``i << 3 t`` of its Fenwick array does; in tiers above 0
    only whole units have maps, ``chunks >> 3 t`` of them. ``units`` and ``octets`` count those of the whole batch (at
    most, if packed), ``sequence_octets`` those of one sequence. ``of_octets`` is for ``place.locate``: in tier 0 that of
    the problem; above, its first token is a first unit, and its tokens are chunks if packed.
    """

    units: int
    octets: int
    sequence_octets: int
    of_octets: tuple[Table, int, int, int]


@dataclass(frozen=True)
class Problem:
    """Sizes of one call, and the tables that place its chunks.

    ``tables`` are those of ``packed_tables``, none if not packed. ``unit_sequence`` maps chunks, then octets, to their sequence
    (-1: none); ``sequences [n, 5]`` holds per sequence its first token, tokens, first chunk, first octet and the absolute
    number of its first chunk. ``channels``: queries and keys come decayed, channel by channel (channel/scores.py).
    """

    batch: int
    length: int
    heads: int
    groups: int
    key_width: int
    value_width: int
    levels: int
    all_chunks: int
    all_octets: int
    chunks: int
    config: ScalarGateConfig | DeltaRuleConfig
    tables: tuple[Tensor, ...]
    channels: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def packed(self) -> bool:
        return len(self.tables) > 0

    @property
    def sequence_count(self) -> int:
        return self.tables[1].shape[0] if self.packed else self.batch

    @property
    def sequence_octets(self) -> int:
        """Octets in one sequence, at most."""
        return cdiv(self.chunks, OCTET.value)

    @property
    def tree_levels(self) -> int:
        """Levels of the tree over chunks, at least 1: the widest entry that a query reads has 2^(this - 1) chunks."""
        return max((self.chunks - 1).bit_length(), 1)

    @property
    def high_levels(self) -> int:
        """Levels of the tree over octets: the levels of ``tree_levels`` above an octet."""
        return (self.sequence_octets - 1).bit_length()

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.groups

    def tile(self, width: int) -> int:
        """``padded``, but no narrower than the configuration's tiles may be."""
        return max(padded(width), self.config.least_tile)

    @property
    def of_chunks(self) -> tuple[Table, int, int, int]:
        """The arguments by which a kernel finds the place of a chunk: table, T, N, NG."""
        return self._places(slice(self.all_chunks))

    @property
    def of_octets(self) -> tuple[Table, int, int, int]:
        """The same of an octet."""
        return self._places(slice(self.all_chunks, None))

    def _places(self, units: slice) -> tuple[Table, int, int, int]:
        table = Table(self.tables[0][units], self.tables[1]) if self.packed else Table(None, None)
        return table, self.length, self.chunks, self.sequence_octets

    def sizes(
        self, dtype: torch.dtype, BK: int = 0, BV: int = 0, BN: int = 0, HEADS: int = 0, LEVELS: int = 0
    ) -> Sizes:
        """The sizes of a launch on inputs of this dtype, with tiles of these widths, as the compiler knows them."""
        exact, chunk = dtype == torch.float32, self.config.chunk
        letters = self.heads, self.groups, self.key_width, self.value_width, chunk, chunk.bit_length() - 1
        flags = exact, self.packed, self.channels, "ieee" if exact else "tf32"
        return constants(Sizes, *letters, BK, BV, BN, HEADS, LEVELS, *flags)

    @property
    def tier_octets(self) -> tuple[tuple[int, int], ...]:
        """(octets of the whole batch, of one sequence) in each of the ``tiers``. Bounds if packed: no table is read."""
        sizes = [(self.all_octets, self.sequence_octets)]
        while sizes[-1][1] > 1:
            below, longest = sizes[-1]
            octets = cdiv(longest, OCTET.value)
            total = below // OCTET.value + self.tables[1].shape[0] if self.packed else self.batch * octets
            sizes.append((total, octets))
        return tuple(sizes)

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The tree from its chunks up to the tier in which a sequence is one octet."""
        tiers = [Tier(self.all_chunks, self.all_octets, self.sequence_octets, self.of_octets)]
        for total, octets in self.tier_octets[1:]:
            below = tiers[-1]
            place, sequences = self.tables[2 * len(tiers) + 1 :][:2] if self.packed else (None, None)
            of_octets = Table(place, sequences), below.sequence_octets, self.chunks, octets
            tiers.append(Tier(below.octets, total, octets, of_octets))
        return tuple(tiers)

    @property
    def path_entries(self) -> int:
        """Entries on the paths of all octets of one sequence; if packed, a bound for all sequences together."""
        return set_bits_before(self.all_octets if self.packed else self.sequence_octets)

    @property
    def path_slots(self) -> int:
        """Entries on the paths of all octets of all sequences."""
        return self.path_entries * (1 if self.packed else self.batch)

    @property
    def path_starts(self) -> Tensor | None:
        """``[n]`` number of path entries of all sequences before each; None if not packed: all have ``path_entries``."""
        return self.tables[2] if self.packed else None


def set_bits_before(n: int) -> int:
    """Bits set in 0, 1, … n - 1 together: the lengths of the paths of n octets."""
    bits = range(n.bit_length())
    return sum((n >> (bit + 1) << bit) + max((n & ((2 << bit) - 1)) - (1 << bit), 0) for bit in bits)


def describe(
    q: Tensor,
    v: Tensor,
    level_scales: Tensor,
    tables: tuple[Tensor, ...],
    config: ScalarGateConfig | DeltaRuleConfig,
    reach: int = 0,
) -> Problem:
    """The problem of one call. The caller checks the shapes.

    reach: if the sequences go on from earlier tokens, a bound on the tokens that each has then seen; 0 if they begin here.
    """
    batch, length, groups, key_width = q.shape
    chunks = cdiv(max(length, reach), config.chunk)
    if tables:
        all_chunks, all_octets = packed_units(length, tables[1].shape[0], config.chunk, reach > 0)
    else:
        all_chunks, all_octets = batch * chunks, batch * cdiv(chunks, OCTET.value)
    return Problem(
        batch=batch,
        length=length,
        heads=v.shape[2],
        groups=groups,
        key_width=key_width,
        value_width=v.shape[3],
        levels=level_scales.shape[-1],
        all_chunks=all_chunks,
        all_octets=all_octets,
        chunks=chunks,
        config=config,
        tables=tables,
    )


def packed_units(length: int, sequences: int, chunk: int, continued: bool = False) -> tuple[int, int]:
    """Bounds on the chunks and octets of ``sequences`` sequences of ``length`` tokens together.

    A continued sequence begins anywhere in an octet.
    """
    all_chunks = length // chunk + sequences
    return all_chunks, all_chunks // OCTET.value + sequences * (2 if continued else 1)


def packed_tables(
    cu_seqlens: Tensor | None, length: int, chunk: int, tree: bool, first_chunks: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The tables of ``Problem``, on the device of ``cu_seqlens [n+1]``; none without it. Nothing waits for the device.

    (unit_sequence, sequences), and with ``tree`` path_starts and two tables per tier from 1 on: octet_sequence, sequences.
    ``first_chunks [n]``: the chunks of a state, of ``CHUNK_SIZE`` tokens, before each sequence; not with ``tree``.
    """
    assert first_chunks is None or not (tree or cu_seqlens is None)
    if cu_seqlens is None:
        return ()
    bounds = cu_seqlens.to(torch.int64)
    size = bounds[1:] - bounds[:-1]
    count = size.numel()
    all_chunks, octets = packed_units(length, count, chunk, first_chunks is not None)
    chunks = (size + chunk - 1) // chunk
    nothing = torch.zeros_like(size)
    before = nothing if first_chunks is None else first_chunks * kernel_chunks(chunk)
    spanned = (before + chunks + OCTET.value - 1) // OCTET.value - before // OCTET.value
    chunk_end, octet_end = chunks.cumsum(0), spanned.cumsum(0)
    first_octet = octet_end - spanned
    columns = (bounds[:-1], size, chunk_end - chunks, first_octet, before)
    units = torch.cat([places(chunk_end, all_chunks), places(octet_end, octets)]).to(torch.int32)
    tables = [units, torch.stack(columns, dim=1).to(torch.int32)]
    if not tree:
        return tuple(tables)
    span, longest = OCTET.value, cdiv(cdiv(length, chunk), OCTET.value)
    tables.append(path_starts((chunks + span - 1) // span, longest))
    while longest > 1:  # one tier above the last: its units are octets of ``span`` chunks
        span, longest = span * OCTET.value, cdiv(longest, OCTET.value)
        octets = octets // OCTET.value + count
        end = ((chunks + span - 1) // span).cumsum(0)
        first_unit, first_octet = first_octet, end - (chunks + span - 1) // span
        columns = (first_unit, chunks, chunk_end - chunks, first_octet, nothing)
        tables += [places(end, octets).to(torch.int32), torch.stack(columns, dim=1).to(torch.int32)]
    return tuple(tables)


def kernel_chunks(chunk: int) -> int:
    """Chunks of the kernels in one of a state. A state ends where a chunk of its own does, so there must be a whole number.

    Raises ValueError where there is not: the kernels would begin at other tokens.
    """
    if CHUNK_SIZE % chunk:
        raise ValueError(f"config.chunk must divide a state's chunk of {CHUNK_SIZE} tokens (CHUNK_SIZE): got {chunk}")
    return CHUNK_SIZE // chunk


def sizes_of_tables(cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """A stand-in for ``packed_tables`` in a ``Problem`` that gives only sizes: as many sequences, and no work."""
    return () if cu_seqlens is None else (cu_seqlens, cu_seqlens.new_empty(cu_seqlens.shape[0] - 1))


def path_starts(octets: Tensor, longest: int) -> Tensor:
    """``[n]`` path entries of all sequences before each, of ``octets [n]``, each at most ``longest``, octets."""
    entries = torch.zeros_like(octets)
    for bit in range(longest.bit_length()):
        entries += (octets >> (bit + 1) << bit) + ((octets & ((2 << bit) - 1)) - (1 << bit)).clamp(min=0)
    return (entries.cumsum(0) - entries).to(torch.int32)


def places(end: Tensor, count: int) -> Tensor:
    """The sequence of each of ``count`` units, -1 past the last; the units of sequence i end before ``end[i]``."""
    index = torch.searchsorted(end, torch.arange(count, device=end.device), right=True)
    return torch.where(index < end.numel(), index, -1)
