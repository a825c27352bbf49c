"""SEGMENTS: the delta rule and the linear models from a state, to a state, or both, on the kernels: whole prefill or parts.

A segment is cut into blocks of its sequence's tree (``blocks.py``). The state before it gives the first slots of the Fenwick
counter, and the counter at the end gives the state after it. The next segment sees the tokens of an open chunk again as its
first tokens. Differentiable through both states. The scalar gate's tree has a shorter way
(``continued.py``, ``final_state.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.fenwick import aligned_blocks
from loglinear.ops.blocks import Map, Slot, append, carried, from_nothing, read
from loglinear.ops.dispatch import State
from loglinear.ops.inputs import Inputs
from loglinear.state import CHUNK_SIZE, LinearState, LogLinearState


def attend(
    inputs: Inputs,
    scale: float,
    lengths: tuple[int, ...],
    packed: bool,
    state: State | None,
    output_final_state: bool,
) -> tuple[Tensor, State | None]:
    """(o, final state) of either op; arguments as there, ``lengths`` of each sequence.

    Waits for the device once, for the positions of a tree's state.
    """
    q, v = inputs.q, inputs.v
    wide = torch.promote_types(v.dtype, torch.float32)
    gate = v.new_zeros(v.shape[:3], dtype=wide) if inputs.g is None else inputs.g.to(wide)
    whole = inputs._replace(q=q if scale == 1.0 else q * scale, g=gate)
    positions = state.position.tolist() if isinstance(state, LogLinearState) else [0] * len(lengths)
    if packed:
        pieces = [(slice(i, i + 1), slice(a, b)) for i, (a, b) in enumerate(pairwise(accumulate(lengths, initial=0)))]
    elif len(set(positions)) > 1:
        pieces = [(slice(i, i + 1), slice(None)) for i in range(len(lengths))]
    else:
        pieces = [(slice(None), slice(None))]
    outputs, finals = [], []
    for rows, tokens in pieces:
        own = slice(0, 1) if packed else rows
        before = None if state is None else state._map(lambda x, rows=rows: x[rows])
        o, final = _segment(whole.part(own, tokens), before, positions[rows][0] if positions else 0, output_final_state)
        outputs.append(o)
        finals.append(final)
    o = torch.cat(outputs, 1 if packed else 0) if outputs else torch.empty_like(v)
    if not output_final_state:
        return o, None
    return o, _joined([final for final in finals if final is not None], whole)


@dataclass(frozen=True)
class _Final:
    """The final state of rows at one position: ``position [B]``, slots, and for a tree the tokens of the open chunk."""

    position: Tensor
    slots: list[Slot]
    opened: Inputs


def _segment(inputs: Inputs, state: State | None, position: int, with_state: bool) -> tuple[Tensor, _Final | None]:
    """o of the tokens of ``inputs``, all rows after ``position`` tokens of ``state``, and the final state."""
    assert not isinstance(state, LogLinearState) or state.chunk_size == CHUNK_SIZE
    batch, length = inputs.q.shape[:2]
    linear = inputs.linear()
    used = 0 if linear else position % CHUNK_SIZE
    if isinstance(state, LogLinearState) and used:
        inputs = _after_open_tokens(inputs, state, used)
    slots = _slots_of(state, position)
    total = inputs.q.shape[1]
    first = position // CHUNK_SIZE
    closed = 0 if linear else total // CHUNK_SIZE
    blocks = [(len(block) * CHUNK_SIZE, len(block)) for block in aligned_blocks(first, first + closed)]
    if total > closed * CHUNK_SIZE:
        blocks.append((total - closed * CHUNK_SIZE, 0))
    outputs, start = [inputs.v[:, :0]], 0
    for tokens, chunks in blocks:
        block = inputs.part(slice(None), slice(start, start + tokens))
        start += tokens
        # The state after the last closed chunk may be wanted by the open one, or by the caller.
        leaves = with_state if linear else chunks > 0 and (with_state or start < total)
        o, after = from_nothing(block, leaves)
        query, transition = carried(block, bool(slots))
        outputs.append(read(o, query, block, slots))
        if leaves:
            slots = append(slots, Map(transition, after), chunks, linear)
    o = torch.cat(outputs, 1)[:, used:]
    if not with_state:
        return o, None
    seen = state.position + length if state is not None else o.new_full((batch,), length, dtype=torch.int64)
    return o, _Final(seen, slots, inputs.part(slice(None), slice(closed * CHUNK_SIZE, total)))


def _after_open_tokens(inputs: Inputs, state: LogLinearState, used: int) -> Inputs:
    """The tokens of the open chunk, which ask nothing, and behind them the tokens of ``inputs``."""
    old = {"k": state.open_k, "v": state.open_v, "g": state.open_g, "beta": state.open_beta}

    def joined(name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        before = old.get(name)
        if before is None:
            return F.pad(x, (*(0, 0) * (x.dim() - 2), used, 0))
        return torch.cat([before[:, :used].to(x.dtype), x], 1)

    return Inputs(*(joined(name, x) for name, x in zip(inputs._fields, inputs)))  # type: ignore[arg-type]


def _slots_of(state: State | None, position: int) -> list[Slot]:
    """The slots of a state, the oldest first, as seen from the end of its last closed chunk."""
    if state is None:
        return []
    if isinstance(state, LinearState):
        return [Slot(0, state.state)]
    chunks = position // CHUNK_SIZE
    live = [m for m in reversed(range(chunks.bit_length())) if chunks >> m & 1]
    return [Slot(1 << m, state.entries[:, m] * state.decay[:, m].exp()[..., None, None]) for m in live]


def _joined(finals: list[_Final], whole: Inputs) -> State:
    """One state of the rows of all."""
    (_, _, heads, value_width), width = whole.v.shape, whole.k.shape[3]
    wide = torch.promote_types(whole.v.dtype, torch.float32)
    nothing = whole.v.new_zeros(0, heads, width, value_width, dtype=wide)
    position = (
        torch.cat([final.position for final in finals])
        if finals
        else torch.zeros(0, dtype=torch.int64, device=whole.v.device)
    )
    if whole.linear():
        rows = [
            final.slots[0].state.to(wide) if final.slots else nothing.new_zeros(len(final.position), *nothing.shape[1:])
            for final in finals
        ]
        return LinearState(position, torch.cat([nothing, *rows]))
    most = max((slot.chunks.bit_length() for final in finals for slot in final.slots), default=0)
    entries = []
    for final in finals:
        held = {slot.chunks: slot.state.to(wide) for slot in final.slots}
        dead = nothing.new_zeros(len(final.position), *nothing.shape[1:])
        slots = [held.get(1 << m, dead) for m in range(most)]
        entries.append(torch.stack(slots, 1) if slots else dead.unsqueeze(1)[:, :0])

    def opened(name: str) -> Tensor | None:
        parts = [getattr(final.opened, name) for final in finals]
        if any(part is None for part in parts) or getattr(whole, name) is None:
            return None
        like = getattr(whole, name)
        padded = [F.pad(part.to(wide), (*(0, 0) * (part.dim() - 2), 0, CHUNK_SIZE - part.shape[1])) for part in parts]
        return torch.cat([like.new_zeros(0, CHUNK_SIZE, *like.shape[2:], dtype=wide), *padded])

    return LogLinearState(
        position,
        torch.cat([nothing.new_zeros(0, most, *nothing.shape[1:]), *entries]),
        nothing.new_zeros(len(position), most, heads),
        *(opened(name) for name in ("k", "v", "g", "beta")),  # type: ignore[arg-type]
    )
