"""FINAL STATE of the scalar gate from its inputs alone, for prefill calls, whose output the kernels compute.

The slots of a state are consecutive blocks of tokens, and each slot is a product of keys and decayed values. All slots
together cost as much as one linear pass. Whole slots of an earlier state go into a block. Plain torch, differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.ops.blocks import running_sums
from loglinear.state import CHUNK_SIZE, LogLinearState


def final_state(
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    lengths: tuple[int, ...],
    packed: bool,
    before: LogLinearState | None = None,
    positions: list[int] | None = None,
) -> LogLinearState:
    """The state after the last token of sequences that began with these tokens, or with those of a state.

    Args:
        k: ``[B, T, G, K]``. v: ``[B, T, H, V]``. g: ``[B, T, H]`` log decay or None. lengths: tokens of each sequence: B rows
            of T, or with ``packed`` the parts of the only row.
        before: the state of the closed chunks before these tokens, a row per packed sequence. positions: its positions.

    Returns:
        a float32 state (float64 for float64 inputs) with one row per sequence.
    """
    assert before is None or before.chunk_size == CHUNK_SIZE
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    gate = v.new_zeros(v.shape[:3], dtype=dtype) if g is None else g.to(dtype)
    firsts = [0] * len(lengths) if positions is None else [position // CHUNK_SIZE for position in positions]
    slots = max((first + n // CHUNK_SIZE for first, n in zip(firsts, lengths)), default=0).bit_length()
    if not packed:
        length = lengths[0] if lengths else 0
        return _state_of_rows(k, v, gate, length, slots, dtype)
    if not lengths:
        return _state_of_rows(k[:0], v[:0], gate[:0], 0, 0, dtype)
    rows, start = [], 0
    for i, length in enumerate(lengths):
        part = slice(start, start + length)
        old = None if before is None else (before.entries[i : i + 1].to(dtype), before.decay[i : i + 1].to(dtype))
        rows.append(_state_of_rows(k[:, part], v[:, part], gate[:, part], length, slots, dtype, firsts[i], old))
        start += length

    def together(name: str) -> Tensor:
        return torch.cat([getattr(row, name) for row in rows])

    opened = (together("open_k"), together("open_v"), together("open_g"))
    return LogLinearState(together("position"), together("entries"), together("decay"), *opened)


def _state_of_rows(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    length: int,
    slots: int,
    dtype: torch.dtype,
    first: int = 0,
    old: tuple[Tensor, Tensor] | None = None,
) -> LogLinearState:
    """The same for rows of equal length, with ``slots`` slots, after ``first`` chunks whose slots ``old`` holds."""
    batch, _, groups, width = k.shape
    heads, value_width = v.shape[2:]
    chunks, rest = divmod(length, CHUNK_SIZE)
    entries = v.new_zeros(batch, slots, heads, width, value_width, dtype=dtype)
    decay = v.new_zeros(batch, slots, heads, dtype=dtype)
    end, after = first + chunks, g.new_zeros(batch, heads)
    for m in range(slots):  # nearest first: slot m covers the 2^m chunks before ``end``
        if not (first + chunks) >> m & 1:
            continue
        begin = end - (1 << m)
        state, since, within = None, after, g.new_zeros(batch, heads)
        if end > first:
            block = slice((max(begin, first) - first) * CHUNK_SIZE, (end - first) * CHUNK_SIZE)
            gate = g[:, block]
            # Sums, no differences: g may be -inf.
            later = running_sums(F.pad(gate[:, 1:], (0, 0, 0, 1)).flip(1)).flip(1)
            weighted = v[:, block].to(dtype) * later.exp().unsqueeze(-1)
            by_group = weighted.unflatten(2, (groups, heads // groups))
            state = torch.einsum("btgk,btghv->bghkv", k[:, block].to(dtype), by_group).flatten(1, 2)
            within = gate.sum(1)
        for older in range(first.bit_length() if old is not None else 0):
            start = first >> (older + 1) << (older + 1)
            if not (first >> older & 1 and begin <= start < end):
                continue
            entry, log = old[0][:, older], old[1][:, older]  # type: ignore[index]
            if state is None:  # the block is this slot
                state, since = entry, after + log
            else:
                state = state + entry * (within + log).exp()[..., None, None]
        slot = v.new_full((1,), m, dtype=torch.int64)
        entries = entries.index_add(1, slot, state.unsqueeze(1))  # type: ignore[union-attr]
        decay = decay.index_add(1, slot, since.unsqueeze(1))
        after, end = after + within, begin

    def opened(x: Tensor) -> Tensor:
        tail = x[:, length - rest : length].to(dtype)
        return F.pad(tail, (*(0, 0) * (x.dim() - 2), 0, CHUNK_SIZE - rest))

    position = v.new_full((batch,), first * CHUNK_SIZE + length, dtype=torch.int64)
    return LogLinearState(position, entries, decay, opened(k), opened(v), opened(g))
