"""FINAL STATE of the scalar gate from its inputs alone, for calls whose output the kernels compute: prefill.

Special about this file: the slots of a state that starts from nothing are consecutive blocks of tokens, each a product of
keys and decayed values, so together they cost what one linear pass does. Plain torch, differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.state import CHUNK_SIZE, LogLinearState


def final_state(k: Tensor, v: Tensor, g: Tensor | None, lengths: tuple[int, ...], packed: bool) -> LogLinearState:
    """The state after the last token of sequences that began with these tokens.

    Args:
        k: ``[B, T, G, K]``. v: ``[B, T, H, V]``. g: ``[B, T, H]`` log decay or None. lengths: tokens of each sequence: B rows
            of T, or with ``packed`` the parts of the only row.

    Returns:
        a float32 state (float64 for float64 inputs) with one row per sequence.
    """
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    gate = torch.zeros(v.shape[:3], dtype=dtype, device=v.device) if g is None else g.to(dtype)
    slots = max((length // CHUNK_SIZE for length in lengths), default=0).bit_length()
    if not packed:
        length = lengths[0] if lengths else 0
        return _state_of_rows(k, v, gate, length, slots, dtype)
    if not lengths:
        return _state_of_rows(k[:0], v[:0], gate[:0], 0, 0, dtype)
    rows, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        rows.append(_state_of_rows(k[:, part], v[:, part], gate[:, part], length, slots, dtype))
        start += length

    def together(name: str) -> Tensor:
        return torch.cat([getattr(row, name) for row in rows])

    opened = (together("open_k"), together("open_v"), together("open_g"))
    return LogLinearState(together("position"), together("entries"), together("decay"), *opened)


def _state_of_rows(k: Tensor, v: Tensor, g: Tensor, length: int, slots: int, dtype: torch.dtype) -> LogLinearState:
    """The same for rows of equal length, with ``slots`` slots."""
    batch, _, groups, width = k.shape
    heads, value_width = v.shape[2:]
    chunks, rest = divmod(length, CHUNK_SIZE)
    entries = v.new_zeros(batch, slots, heads, width, value_width, dtype=dtype)
    decay = v.new_zeros(batch, slots, heads, dtype=dtype)
    end, after = chunks * CHUNK_SIZE, g.new_zeros(batch, heads)
    for m in range(slots):  # nearest first: slot m covers the 2^m chunks before ``end``
        if not chunks >> m & 1:
            continue
        block = slice(end - (CHUNK_SIZE << m), end)
        gate = g[:, block]
        later = F.pad(gate[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)  # sums, no differences: g may be -inf
        weighted = v[:, block].to(dtype) * later.exp().unsqueeze(-1)
        by_group = weighted.unflatten(2, (groups, heads // groups))
        state = torch.einsum("btgk,btghv->bghkv", k[:, block].to(dtype), by_group).flatten(1, 2)
        slot = torch.tensor([m], device=v.device)
        entries = entries.index_add(1, slot, state.unsqueeze(1))
        decay = decay.index_add(1, slot, after.unsqueeze(1))
        after = after + gate.sum(1)
        end -= CHUNK_SIZE << m

    def opened(x: Tensor) -> Tensor:
        tail = x[:, length - rest : length].to(dtype)
        return F.pad(tail, (*(0, 0) * (x.dim() - 2), 0, CHUNK_SIZE - rest))

    position = torch.full((batch,), length, dtype=torch.int64, device=v.device)
    return LogLinearState(position, entries, decay, opened(k), opened(v), opened(g))
