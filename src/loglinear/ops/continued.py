"""CONTINUED: the scalar gate's kernels for sequences that go on from a state: chunked prefill, training over segments.

A linear recurrence superposes. The kernels see only the tokens since the last closed chunk, in the chunks and levels of the
whole sequence. This module adds the reads of the queries from the state's slots, with one matrix product per slot. It is
plain torch around the kernels, differentiable through both states.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from loglinear.ops.blocks import running_sums
from loglinear.ops.dispatch import State
from loglinear.ops.final_state import final_state
from loglinear.ops.forward import by_kernels
from loglinear.ops.inputs import Inputs
from loglinear.state import CHUNK_SIZE, LogLinearState


def attend(
    inputs: Inputs,
    scale: float,
    lengths: tuple[int, ...],
    packed: bool,
    state: State | None,
    output_final_state: bool,
) -> tuple[Tensor, LogLinearState | None]:
    """(o, final state) of ``log_linear_attention`` from ``state``; arguments as there, ``lengths`` of each sequence.

    Waits for the device once, for the positions.
    """
    q, k, v, g, _, level_scales = inputs
    assert isinstance(state, LogLinearState)
    assert state.chunk_size == CHUNK_SIZE
    assert level_scales is not None
    positions = state.position.tolist()
    used = [position % CHUNK_SIZE for position in positions]
    gate = torch.zeros(v.shape[:3], dtype=torch.float32, device=v.device) if g is None else g.float()
    stream = _Stream(lengths, used)
    q_all, scales_all = stream.join(None, q), stream.join(None, level_scales)
    k_all, v_all, g_all = (stream.join(a, b) for a, b in ((state.open_k, k), (state.open_v, v), (state.open_g, gate)))
    sizes = [a + b for a, b in zip(used, lengths)]
    bounds = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(v.device, non_blocking=True)
    first_chunks = state.position // CHUNK_SIZE
    # Kernels are compiled for a depth of the tree: a power of two is the same depth for many positions.
    reach = 1 << max(max(p + n for p, n in zip(positions, lengths)) - 1, 0).bit_length()
    o = by_kernels(Inputs(q_all, k_all, v_all, g_all, None, scales_all), scale, bounds, first_chunks, reach)
    o = stream.new_tokens(o).reshape(v.shape)

    rows = [slice(a, b) for a, b in zip(accumulate((0, *lengths)), accumulate(lengths))] if packed else [slice(None)]
    parts = []
    for i, tokens in enumerate(rows):
        some = slice(i, i + 1) if packed else slice(None)
        row = state._map(lambda x, some=some: x[some])
        parts.append(_read_slots(q[:, tokens], gate[:, tokens], level_scales[:, tokens], row, positions[some], scale))
    o = (o.float() + torch.cat(parts, 1)).to(v.dtype)
    if not output_final_state:
        return o, None
    return o, final_state(k_all, v_all, g_all, tuple(sizes), True, state, positions)


class _Stream:
    """Sequences of ``lengths`` new tokens, each after the ``used`` tokens of its open chunk, packed into one row."""

    def __init__(self, lengths: tuple[int, ...], used: list[int]) -> None:
        self.lengths, self.used = lengths, used

    def join(self, opened: Tensor | None, new: Tensor) -> Tensor:
        """``[1, T', ...]`` of new's dtype, from ``opened [n, C, ...]`` (None is zeros) and new ``[B, T, ...]``."""
        flat = new.reshape(1, -1, *new.shape[2:])
        if not any(self.used):
            return flat
        parts = []
        for i, (count, tokens) in enumerate(zip(self.used, flat.split(self.lengths, dim=1))):
            before = flat.new_zeros(1, count, *flat.shape[2:]) if opened is None else opened[i : i + 1, :count]
            parts += [before.to(flat.dtype), tokens]
        return torch.cat(parts, 1)

    def new_tokens(self, joined: Tensor) -> Tensor:
        """``[1, T, ...]`` without the tokens that ``join`` put before the new ones."""
        if not any(self.used):
            return joined
        sizes = [size for pair in zip(self.used, self.lengths) for size in pair]
        return torch.cat(joined.split(sizes, dim=1)[1::2], 1)


def _read_slots(
    q: Tensor, g: Tensor, level_scales: Tensor, state: LogLinearState, positions: list[int], scale: float
) -> Tensor:
    """The reads ``[B, T, H, V]``, float32, of queries ``[B, T, G, K]`` from the slots of the state before them.

    All tokens of a slot are on one level for a query: the level of the highest bit in which the query's chunk differs from
    the slot's chunks.
    """
    (batch, length, groups, _), heads = q.shape, g.shape[2]
    shift, levels = state.chunk_size.bit_length() - 1, level_scales.shape[3]
    position = state.position.unsqueeze(1)
    chunk = (position + torch.arange(length, device=q.device)) >> shift  # [B, T]
    closed = position >> shift
    dead = torch.arange(state.chunk_size, device=q.device) >= position % state.chunk_size  # [B, C]
    opened = state.open_g.float().masked_fill(dead.unsqueeze(2), 0.0)
    since = running_sums(g) + opened.sum(1, keepdim=True)  # log decay from the last closed chunk on
    total = q.new_zeros(batch, length, heads, state.entries.shape[4], dtype=torch.float32)
    for m in range(max(p >> shift for p in positions).bit_length() if positions else 0):
        apart = chunk ^ (closed >> (m + 1) << (m + 1))
        level = (shift + _bit_length(apart)).clamp(max=levels - 1)
        read = level_scales.gather(3, level[:, :, None, None].expand(-1, -1, heads, 1)).squeeze(3).float()
        weight = read * (since + state.decay[:, None, m].float()).exp() * ((closed >> m) & 1).unsqueeze(2)
        entry = state.entries[:, m].unflatten(1, (groups, heads // groups)).to(q.dtype)  # [B, G, R, K, V]
        found = q.transpose(1, 2) @ entry.transpose(2, 3).flatten(3)  # [B, G, T, R V]
        found = found.unflatten(3, (heads // groups, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)
        total = torch.addcmul(total, found.float(), weight.unsqueeze(3), value=scale)
    return total


def _bit_length(x: Tensor) -> Tensor:
    """Bits of integers 0 <= x < 2^52."""
    return torch.frexp(x.double()).exponent
