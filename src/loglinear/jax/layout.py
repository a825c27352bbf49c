"""LAYOUT: the place of every token in blocks that are aligned to the positions of their sequence, in integers that may
be traced.

Shapes depend on T, on the number of sequences and on the block alone. Blocks past the last token hold none.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from loglinear.jax.scan import Place


class Layout(NamedTuple):
    """Source and place of tokens. Rows are those of the batch, or one row that holds all packed sequences.

    source ``[rows, N · block]``: what stands at each place, an index into the open tokens of the row's states
    (``block`` for each), then the T new tokens, then one token of zeros. place ``[rows, T]``: where
    each new token stands. Both None: in order, from place 0 on.
    steps: N ``Place``. origin ``[rows, N]``: the first block of each block's sequence. For each sequence: first, the
    block of its position at the start; begin, open_block, the blocks among the N where it begins and which stays open
    at its end; row, where these are; end, its position.
    """

    source: Array | None
    place: Array | None
    steps: Place
    origin: Array
    first: Array
    begin: Array
    open_block: Array
    row: Array
    end: Array


def plain_layout(rows: int, length: int, block: int) -> Layout:
    """Rows of ``length`` tokens from the start of their sequences."""
    blocks = max(-(-length // block), 1)
    still = jnp.zeros(blocks, jnp.int32)
    number = jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.int32)[:, None], (blocks, rows))
    steps = Place(still, still.astype(bool), number, (number + 1) * block <= length)
    each = jnp.zeros(rows, jnp.int32)
    origin = jnp.zeros((rows, blocks), jnp.int32)
    return Layout(
        None, None, steps, origin, each, each, each + length // block, jnp.arange(rows, dtype=jnp.int32), each + length
    )


def rows_layout(position: Array, length: int, block: int, lengths: Array | None = None) -> Layout:
    """Rows of ``length`` new tokens that go on from ``position [B]``; of ``lengths [B]``, with padding behind them."""
    rows = position.shape[0]
    blocks = -(-(length + block - 1) // block)
    plain = plain_layout(rows, blocks * block, block)
    number = jnp.broadcast_to(jnp.int32(length), (rows,)) if lengths is None else lengths.astype(jnp.int32)
    used, first, end = position % block, position // block, position + number
    at = jnp.arange(blocks * block, dtype=jnp.int32) - used[:, None]
    source = jnp.where(at < 0, at + used[:, None], jnp.where(at < number[:, None], block + at, block + length))
    index = plain.steps.number + first
    steps = plain.steps._replace(number=index, whole=(index + 1) * block <= end)
    place = used[:, None] + jnp.arange(length, dtype=jnp.int32)
    return plain._replace(
        source=source, place=place, steps=steps, first=first, open_block=end // block - first, end=end
    )


def packed_layout(offsets: Array, position: Array | None, length: int, block: int, states: bool) -> Layout:
    """Sequences ``offsets [n + 1]`` along one row of ``length`` tokens. position ``[n]``: where each goes on from; None
    is the start.

    states: whether every sequence has a row of slots; otherwise all share one, which each finds empty.
    """
    count = offsets.shape[0] - 1
    offsets = offsets.astype(jnp.int32)
    start, stop = offsets[:-1], offsets[1:]
    opened = 0 if position is None else count * block
    position = jnp.zeros(count, jnp.int32) if position is None else position
    used, first, end = position % block, position // block, position + stop - start
    blocks = -(-(used + stop - start) // block)
    before = jnp.cumsum(blocks) - blocks
    slots = length // block + 2 * count
    number = jnp.arange(slots, dtype=jnp.int32)
    sequence = jnp.searchsorted(before, number, side="right").astype(jnp.int32) - 1
    local = number - before[sequence]
    at = local[:, None] * block + jnp.arange(block, dtype=jnp.int32) - used[sequence, None]
    tokens = start[sequence, None] + at
    source = jnp.where(at < 0, sequence[:, None] * block + at + used[sequence, None], opened + tokens)
    source = jnp.where(tokens < stop[sequence, None], source, opened + length)
    index, there = first[sequence] + local, local < blocks[sequence]
    if states:
        whole = there & ((index + 1) * block <= end[sequence])
        steps = Place(sequence, jnp.zeros(slots, bool), index[:, None], whole[:, None])
    else:
        whole = local + 1 < blocks[sequence]
        steps = Place(jnp.zeros(slots, jnp.int32), there & (local == 0), index[:, None], whole[:, None])
    t = jnp.arange(length, dtype=jnp.int32)
    owner = jnp.searchsorted(stop, t, side="right").astype(jnp.int32)
    place = before[owner] * block + used[owner] + t - start[owner]
    row, origin = jnp.zeros(count, jnp.int32), before[sequence][None]
    opening = before + end // block - first
    return Layout(source.reshape(1, -1), place[None], steps, origin, first, before, opening, row, end)


def offsets_of(segment_ids: Array, segments: int) -> Array:
    """``[B, T]`` numbers of documents to the offsets ``[segments + 1]`` of the flattened rows; a row's start starts one
    too.
    """
    batch, length = segment_ids.shape
    change = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jnp.nonzero(change.reshape(-1), size=segments, fill_value=batch * length)[0]
    return jnp.append(starts, batch * length).astype(jnp.int32)


def number_of_segments(segment_ids: Array) -> Array:
    """Documents in all rows of ``[B, T]``."""
    batch, length = segment_ids.shape
    return (segment_ids[:, 1:] != segment_ids[:, :-1]).sum() + (batch if length else 0)
