"""PARTITION, in tensors: the place of every token, chunk and entry of a batch of sequences.

Chunks are aligned to each sequence's *absolute* position. One table therefore serves whole batches, packed sequences of any
length and rows that continue from any position. The module uses integers only, vectorised, without a loop over tokens or
chunks. The chunks of all sequences stand in one list of N chunks. Their entries stand in one list: N local entries, then
S·M slots of the states that the sequences continue from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Index tensors (int64) for S sequences cut into N chunks of C tokens.

    Attributes:
        place: ``[tokens]``, the place of each new token among the N·C places of the chunks.
        open_from, open_place: the live tokens of the initial open chunks among S·C, and their places.
        regular: tokens lie in the places in order and fill them, so that placing is a reshape.
        builds: per level m the triples (entry, earlier entry to fold in): ``e`` and ``e - 2**m``.
        reads: per level m the pairs (chunk, entry): chunks with bit m of their index set, and what they read there.
        final_reads: the same for the path of the state after the last token, (sequence, entry).
        open_chunk: ``[S]``, the chunk that stays open, and ``open_live [S, C]``, which of its tokens exist.
        position: ``[S]``, tokens seen at the end.
        num_slots: M' of the final state.
        run: ``[N]``, the first chunk of each chunk's sequence.
        spans: ``[S, M', 2]``, per slot of the final state the closed chunks from its first one on, as (first, end); none for
            a dead slot. Linear: M' is 1, and all chunks.
        waves: for the linear form only (it loops over chunks), per step i the pairs (sequence, chunk): the i-th chunk of
            every sequence that has one.
    """

    num_chunks: int
    num_local: int
    place: Tensor
    open_from: Tensor
    open_place: Tensor
    regular: bool
    builds: list[tuple[Tensor, Tensor]]
    reads: list[tuple[Tensor, Tensor]]
    final_reads: list[tuple[Tensor, Tensor]]
    open_chunk: Tensor
    open_live: Tensor
    position: Tensor
    num_slots: int
    run: Tensor
    spans: Tensor
    waves: list[tuple[Tensor, Tensor]]


def _ragged_arange(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For counts ``[S]``: the owner and the index within its owner of each of ``counts.sum()`` items."""
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    first = torch.cumsum(counts, 0) - counts
    return owner, torch.arange(len(owner)) - first[owner]


@lru_cache(maxsize=64)
def build_layout(
    lengths: tuple[int, ...],
    positions: tuple[int, ...],
    num_slots: int,
    chunk_size: int,
    device: torch.device,
    linear: bool = False,
) -> Layout:
    """Lay out ``lengths[s]`` new tokens of each sequence s that has already seen ``positions[s]`` tokens.

    Args:
        lengths, positions: tokens, each >= 0. num_slots: M of the initial state (0 without one).
        chunk_size: C, a power of two. device: where the tables are wanted.
        linear: whether waves are wanted.
    """
    # The tables outlive the call: they must not belong to a torch.func transform, inference mode or default device.
    with torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.device("cpu"):
        return _build_layout(lengths, positions, num_slots, chunk_size, device, linear)


def _build_layout(
    lengths: tuple[int, ...],
    positions: tuple[int, ...],
    num_slots: int,
    chunk_size: int,
    device: torch.device,
    linear: bool,
) -> Layout:
    length, start = torch.tensor(lengths, dtype=torch.int64), torch.tensor(positions, dtype=torch.int64)
    first_chunk, used = start // chunk_size, start % chunk_size
    chunks = (used + length + chunk_size - 1) // chunk_size
    end = start + length
    offset = torch.cumsum(chunks, 0) - chunks
    num_local = int(chunks.sum())
    num_chunks = max(num_local, 1)

    def entry_index(sequence: Tensor, e: Tensor, slot: int) -> Tensor:
        """Where entry e of a sequence lies: among the local ones, or in ``slot`` of the state it continues from."""
        local = offset[sequence] + e - first_chunk[sequence] - 1
        return torch.where(e > first_chunk[sequence], local, num_chunks + sequence * num_slots + slot)

    def paths(sequence: Tensor, n: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Query paths of the chunks n, one level at a time: (which of them read, what they read)."""
        tables = []
        for m in range(int(n.max()).bit_length() if len(n) else 0):
            reading = ((n >> m) & 1).nonzero().squeeze(1)
            tables.append((reading, entry_index(sequence[reading], n[reading] >> m << m, m)))
        return tables

    owner, token = _ragged_arange(length)
    place = offset[owner] * chunk_size + used[owner] + token
    open_owner, open_token = _ragged_arange(used)
    sequence, local = _ragged_arange(chunks)
    n = first_chunk[sequence] + local

    builds = []
    closed = n[n < (end // chunk_size)[sequence]] + 1  # entries whose chunks are all full
    closed_sequence = sequence[n < (end // chunk_size)[sequence]]
    for m in range(int(closed.max()).bit_length() - 1 if len(closed) else 0):
        folding = (closed % (2 << m) == 0).nonzero().squeeze(1)
        e, owner_m = closed[folding], closed_sequence[folding]
        builds.append((entry_index(owner_m, e, 0), entry_index(owner_m, e - (1 << m), m)))

    final = end // chunk_size
    live = end % chunk_size
    steps = max(chunks.tolist(), default=0) if linear else 0
    waves = [(w := (chunks > i).nonzero().squeeze(1), offset[w] + i) for i in range(steps)]

    slots = max(num_slots, int(final.max()).bit_length() if len(final) else 0)
    shift = torch.arange(slots)
    slot_start = torch.where(final[:, None] >> shift & 1 == 1, final[:, None] >> shift + 1 << shift + 1, final[:, None])
    slot_start = torch.maximum(slot_start, first_chunk[:, None])
    ends = final[:, None].expand_as(slot_start)
    spans = (torch.stack([slot_start, ends], -1) - first_chunk[:, None, None]) + offset[:, None, None]
    if linear:
        spans = torch.stack([offset, offset + chunks], -1).unsqueeze(1)
    run = offset[sequence] if num_local else torch.zeros(1, dtype=torch.int64)

    def move(tables: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return [(left.to(device), right.to(device)) for left, right in tables]

    return Layout(
        num_chunks=num_chunks,
        num_local=num_local,
        place=place.to(device),
        open_from=(open_owner * chunk_size + open_token).to(device),
        open_place=(offset[open_owner] * chunk_size + open_token).to(device),
        regular=len(place) == num_chunks * chunk_size and bool((used == 0).all()),
        builds=move(builds),
        reads=move(paths(sequence, n)),
        final_reads=move(paths(torch.arange(len(lengths)), final)),
        open_chunk=torch.where(live > 0, offset + final - first_chunk, 0).to(device),
        open_live=(torch.arange(chunk_size) < live[:, None]).to(device),
        position=end.to(device),
        num_slots=slots,
        run=run.to(device),
        spans=spans.to(device),
        waves=move(waves),
    )
