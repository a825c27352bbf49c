"""SEGMENTS: both ops from a state, to a state, or both: whole prefill or parts of it, training over segments.

The *stream* of a sequence is the tokens of its open chunk, which ask nothing, and behind them the new tokens. It is cut into
blocks of the whole sequence's tree. A Fenwick counter begins with the slots of the state, walks over the blocks with the verbs
of ``blocks.py``, and ends as the slots of the final state. Differentiable through both states.

The transitions differ in one point. Kernels of the scalar gate take the place of a sequence in a longer one: one call makes o
of all streams, so no query reads a block of its own stream again, and a second counter holds what stands before the stream.
Kernels of the delta rule begin at a tree's first chunk, and its queries pass through matrices: each block is a call of its
own, or two if slots stand before it.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.fenwick import aligned_blocks
from loglinear.ops import checks, dispatch
from loglinear.ops.attention import KERNELS, attention
from loglinear.ops.blocks import Map, Query, Slot, append, carried, from_nothing, read, wide_dtype
from loglinear.ops.inputs import Call, Inputs, State
from loglinear.state import CHUNK_SIZE, LinearState, LogLinearState, joined


def attend(call: Call, lengths: tuple[int, ...], o: Tensor | None = None) -> tuple[Tensor, State | None]:
    """(o, final state) of a call of sequences of these lengths.

    o: of these tokens alone, if it is known; not with a state. Waits for the device once, for the positions of a tree's state.
    """
    inputs, scale, state, output_final_state, *_ = call
    wide, v = wide_dtype(inputs), inputs.v
    gate = v.new_zeros(v.shape[:3], dtype=wide) if inputs.g is None else inputs.g.to(wide)
    tree = state if isinstance(state, LogLinearState) else None
    assert tree is None or tree.chunk_size == CHUNK_SIZE
    positions = [0] * len(lengths) if tree is None else tree.position.tolist()
    used = [position % CHUNK_SIZE for position in positions]
    alike = len(set(positions)) < 2 and (call.cu_seqlens is None or len(lengths) < 2)
    stream = _stream(inputs._replace(g=gate), tree, lengths, used, alike)
    if o is None and tree is not None and inputs.transition().by_log and not checks.transforming():
        o = _at_once(stream, scale, lengths, positions) if dispatch.attention(inputs) else None
    if o is None and scale != 1.0:
        stream, scale = stream._replace(q=stream.q * scale), 1.0

    if alike:
        pieces = [(slice(len(lengths)), slice(None))]
    else:
        bounds = pairwise(accumulate((a + b for a, b in zip(used, lengths)), initial=0))
        pieces = [(slice(i, i + 1), slice(a, b)) for i, (a, b) in enumerate(bounds)]
    outputs, finals = [], []
    for rows, tokens in pieces:
        own = rows if alike else slice(None)
        before = None if state is None else state._map(lambda x, rows=rows: x[rows])
        position, new = (positions[rows] or [0])[0], (lengths[rows] or (0,))[0]
        part, known = stream.part(own, tokens), None if o is None else o[own, tokens]
        slots = _slots_of(before, position)
        walked, slots = _walk(part, known, slots, position // CHUNK_SIZE, output_final_state, scale)
        outputs.append(walked[:, walked.shape[1] - new :])
        if output_final_state:
            seen = torch.full((len(positions[rows]),), position + new, dtype=torch.int64, device=v.device)
            opened = part.part(slice(None), slice(_closed(part), None))
            finals.append(_state_of(slots, opened, seen if before is None else before.position + new))
    out = outputs[0] if alike else torch.cat([x.flatten(0, 1) for x in outputs])
    return out.reshape(v.shape), joined(finals) if output_final_state else None


def _stream(
    whole: Inputs, state: LogLinearState | None, lengths: tuple[int, ...], used: list[int], alike: bool
) -> Inputs:
    """The streams as rows if they are alike, else one behind the other in a single row."""

    def extended(name: str, x: Tensor | None) -> Tensor | None:
        if x is None or (alike and not any(used)):
            return x
        flat, opened = x.reshape(1, -1, *x.shape[2:]), getattr(state, f"open_{name}", None)  # [n, heads, C, ...]
        if any(used):
            parts = []
            for row, (count, new) in enumerate(zip(used, flat.split(lengths, 1))):
                before = (
                    new.new_zeros(1, count, *new.shape[2:])
                    if opened is None
                    else opened[row : row + 1, :, :count].transpose(1, 2)
                )
                parts += [before.to(new.dtype), new]
            flat = torch.cat(parts, 1)
        return flat.reshape(len(lengths), -1, *x.shape[2:]) if alike else flat

    return Inputs(*(extended(name, x) for name, x in zip(whole._fields, whole)))  # type: ignore[arg-type]


def _at_once(stream: Inputs, scale: float, lengths: tuple[int, ...], positions: list[int]) -> Tensor:
    """o of all streams with nothing before them, in the chunks and levels of the whole sequences."""
    # Both on the CPU: there tables of chunks cost the host less than their launches on a GPU would.
    sizes = [position % CHUNK_SIZE + length for position, length in zip(positions, lengths)]
    bounds = torch.tensor([0, *accumulate(sizes)])
    first = torch.tensor([position // CHUNK_SIZE for position in positions], dtype=torch.int64)
    # Kernels are compiled for a depth of the tree: a power of two is the same depth for many positions.
    reach = 1 << max(max(p + n for p, n in zip(positions, lengths)) - 1, 0).bit_length()
    flat = stream.each(lambda x: x.reshape(1, -1, *x.shape[2:]))
    return attention.function.apply(*flat, bounds, first, (scale, reach, "", KERNELS))[0].reshape(stream.v.shape)


def _closed(stream: Inputs) -> int:
    """Tokens in closed chunks. Without a tree there are none."""
    return 0 if stream.linear() else stream.q.shape[1] // CHUNK_SIZE * CHUNK_SIZE


def _walk(
    inputs: Inputs, o: Tensor | None, slots: list[Slot], first: int, with_state: bool, scale: float
) -> tuple[Tensor, list[Slot]]:
    """(o, slots at the end) of streams that begin with chunk ``first``, whose ``slots`` stand before them.

    o: of the streams with nothing before them, if it is known. The slots at the end have a meaning only ``with_state``.
    """
    total, closed, linear, known = inputs.q.shape[1], _closed(inputs), inputs.linear(), o is not None
    blocks = [(len(block) * CHUNK_SIZE, len(block)) for block in aligned_blocks(first, first + closed // CHUNK_SIZE)]
    if total > closed:
        blocks.append((total - closed, 0))
    before = slots if known else []  # what stands before the stream, in the counter's slots
    outputs, start, reads = [inputs.v[:, :0]], 0, bool(before) or not known
    for tokens, chunks in blocks if reads or with_state else []:
        block = inputs.part(slice(None), slice(start, start + tokens))
        alone = None if o is None else o[:, start : start + tokens]
        start += tokens
        # The state after the last closed chunk may be wanted by the open one, or by the caller.
        leaves = with_state if linear else chunks > 0 and (with_state or (not known and start < total))
        alone, state = from_nothing(block, leaves, alone)
        query, transition = carried(block) if slots or before else (Query(block.q), None)
        outputs.append(read(alone, query, block, before if known else slots, scale))
        slots = append(slots, Map(transition, state), chunks, linear) if leaves else slots
        before = append(before, Map(transition, None), chunks, linear) if before and chunks else before
    return torch.cat(outputs, 1) if o is None or reads else o, slots


def _slots_of(state: State | None, position: int) -> list[Slot]:
    """The slots of a state, the oldest first, as seen from the end of its last closed chunk."""
    if state is None:
        return []
    if isinstance(state, LinearState):
        return [Slot(0, state.state)]
    chunks = position // CHUNK_SIZE
    live = [m for m in reversed(range(chunks.bit_length())) if chunks >> m & 1]
    slots = [Slot(1 << m, state.entries[:, :, m], state.decay[:, :, m]) for m in live]
    return slots if state.transition.by_log else [Slot(slot.chunks, slot.value()) for slot in slots]


def _state_of(slots: list[Slot], opened: Inputs, position: Tensor) -> State:
    """The state at the end of a walk, of its slots and the tokens of the open chunk."""
    wide = wide_dtype(opened)
    (rows, _, heads, value_width), width = opened.v.shape, opened.k.shape[3]
    held = {slot.chunks: slot for slot in slots}
    nothing = opened.v.new_zeros(rows, heads, width, value_width, dtype=wide)
    if opened.linear():
        return LinearState(position, next((x.state.to(wide, copy=True) for x in slots if x.state is not None), nothing))
    slots = [held.get(1 << m, Slot(1 << m, nothing)) for m in range(max(held, default=0).bit_length())]
    entries = [slot.state.to(wide).unsqueeze(2) for slot in slots if slot.state is not None]
    logs = [nothing.new_zeros(rows, heads) if slot.log is None else slot.log.to(wide) for slot in slots]

    def padded(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return F.pad(x.to(wide).transpose(1, 2), (*(0, 0) * (x.dim() - 3), 0, CHUNK_SIZE - x.shape[1]))

    return LogLinearState(
        position,
        torch.cat([nothing.unsqueeze(2)[:, :, :0], *entries], 2),
        torch.stack(logs, 2) if logs else nothing.new_zeros(rows, heads, 0),
        *(padded(x) for x in (opened.k, opened.v, opened.g, opened.beta)),  # type: ignore[arg-type]
    )
