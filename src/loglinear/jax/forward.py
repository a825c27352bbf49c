"""FORWARD: a checked call as blocks, a scan over them, and a state.

Without a state a block is many chunks, whose outputs come from halving. A state goes on at any position, so that its
blocks are single chunks. A linear model has no tree to align with: its blocks start where its new tokens do.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from loglinear.jax.finite import spoil, spoiled_sequences, spoiled_slots, spoiled_tokens, without_bad_tokens
from loglinear.jax.inputs import Inputs, in_order, known
from loglinear.jax.layout import Layout, packed_layout, plain_layout, rows_layout
from loglinear.jax.products import numbers_of
from loglinear.jax.scan import Sizes, Slots, empty_slots, run
from loglinear.jax.state import CHUNK_SIZE, LinearState, LogLinearState, State, empty_state, slots_for

BLOCK_CHUNKS: int | None = None  # chunks in a block, at most; None: what ``block_chunks`` says


class Plan(NamedTuple):
    """chunk, block: tokens of each. states: whether each sequence has slots of its own. slots: M, of blocks. kernels:
    as in ``Numbers``.
    """

    chunk: int
    block: int
    states: bool
    slots: int
    kernels: bool = False


def forward(
    inputs: Inputs,
    scale: float,
    state: State | None,
    final: bool,
    cu_seqlens: Array | None,
    kernels: bool = False,
    lengths: Array | None = None,
) -> tuple[Array, State | None]:
    """o ``[B, T, H, V]`` and, where ``final``, the state after the last token, or the last of ``lengths``."""
    linear, length = inputs.level_scales is None, inputs.q.shape[1]
    if lengths is not None:
        there = jnp.arange(length) < lengths[:, None]
        inputs = inputs.map(
            lambda x: jnp.where(there.reshape(*there.shape, *(1,) * (x.ndim - 2)), x, 0).astype(x.dtype)
        )
        state = state if linear or state is not None else _nothing(inputs)
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = final or state is not None
    chunk, block = block_sizes(length, sequences)
    if linear:
        plan = Plan(chunk, block, states, 1, kernels)
    elif not states:
        plan = Plan(chunk, block, False, (-(-length // block) - 1).bit_length(), kernels)
    elif state is None and cu_seqlens is None and length >= CHUNK_SIZE:
        return _prefill(inputs, scale, kernels)
    else:
        size = state.chunk_size if isinstance(state, LogLinearState) else CHUNK_SIZE
        plan = Plan(size, size, True, _slots_after(state, length, size, cu_seqlens), kernels)
    o, new = one_pass(inputs, scale, state, cu_seqlens, plan, lengths)
    return o, new if final else None


def _nothing(inputs: Inputs) -> LogLinearState:
    """The state before the first token of these rows."""
    (rows, _, groups, width), (heads, value_width) = inputs.q.shape, inputs.v.shape[2:]
    delta, sizes = inputs.beta is not None, (rows, groups, heads, width, value_width)
    return empty_state(*sizes, 0, dtype=inputs.v.dtype, delta_rule=delta, per_channel=inputs.per_channel)


def block_chunks() -> int:
    """Chunks in a block, at most. 128 took half of the time of 16 on an H200, and more time on a CPU."""
    return BLOCK_CHUNKS or (128 if jax.default_backend() == "gpu" else 16)


def block_sizes(length: int, sequences: int) -> tuple[int, int]:
    """C and the tokens of a block: not many more than there are in a sequence."""
    each = max(length // max(sequences, 1), 1)
    chunk = min(CHUNK_SIZE, 1 << (each - 1).bit_length())
    return chunk, chunk * min(block_chunks(), 1 << max(each // chunk, 1).bit_length() - 1)


def _slots_after(state: State | None, length: int, size: int, cu_seqlens: Array | None) -> int:
    """Slots of the state after ``length`` tokens: those that it needs where positions and offsets are known."""
    added = np.diff(np.asarray(cu_seqlens)) if cu_seqlens is not None and known(cu_seqlens) else np.array([length])
    if not isinstance(state, LogLinearState):
        return slots_for(int(added.max(initial=0)), size)
    before = np.asarray(state.position) if known(state.position) else np.array([size - 1])
    return max(state.entries.shape[2], slots_for(int((before + added).max(initial=0)), size))


@partial(jax.jit, static_argnums=(1, 2))
def _prefill(inputs: Inputs, scale: float, kernels: bool) -> tuple[Array, State | None]:
    """Whole blocks of many chunks first, and the rest chunk by chunk, which leaves the state."""
    length = inputs.q.shape[1]
    chunk, block = block_sizes(length, 1)
    cut = length // block * block
    first, rest = (inputs.map(lambda x, part=part: x[:, part]) for part in (slice(cut), slice(cut, None)))
    before, state = one_pass(first, scale, None, None, Plan(chunk, block, True, (cut // block).bit_length(), kernels))
    if cut == length:
        return before, state
    o, state = one_pass(rest, scale, state, None, Plan(chunk, chunk, True, slots_for(length, chunk), kernels))
    return jnp.concatenate([before, o], 1), state


@partial(jax.jit, static_argnums=(1, 4))
def one_pass(
    inputs: Inputs,
    scale: float,
    state: State | None,
    cu_seqlens: Array | None,
    plan: Plan,
    lengths: Array | None = None,
) -> tuple[Array, State | None]:
    """One scan over blocks of one size: o, and the state if there are states."""
    tree, (rows, length) = state if isinstance(state, LogLinearState) else None, inputs.q.shape[:2]
    position = None if tree is None else tree.position
    if cu_seqlens is not None:
        layout = packed_layout(cu_seqlens, position, length, plan.block, plan.states)
    elif position is None:
        layout = plain_layout(rows, length, plan.block)
        if lengths is not None:  # of a linear model, which has one slot
            layout = layout._replace(end=lengths.astype(jnp.int32))
    else:
        layout = rows_layout(position, length, plan.block, lengths)
    placed = _placed(inputs, tree, layout, layout.origin.shape[1] * plan.block)
    clean, bad = without_bad_tokens(placed)
    blocks = clean.blocks(layout.origin.shape[1], plan.chunk)
    shared = cu_seqlens is not None and not plan.states  # one row of slots for all sequences
    past = _slots_before(blocks.v.shape, inputs, state, 1 if shared else layout.end.shape[0], plan.slots)
    out, past = run(Sizes(numbers_of(inputs.v.dtype, plan.kernels), scale), past, blocks, layout.steps)
    out = spoil(in_order(out), spoiled_tokens(bad, layout))
    if layout.place is None:
        o = out[:, :length]
    else:
        o = jnp.take_along_axis(out, layout.place[..., None, None], 1)
    return o, _state_after(placed, bad, past, state, layout, plan) if plan.states else None


def _placed(inputs: Inputs, tree: LogLinearState | None, layout: Layout, places: int) -> Inputs:
    """The tokens at their places ``[rows, N · block, …]``; empty places hold zeros, which write nothing and decay
    nothing.
    """
    if layout.source is None:
        more = places - inputs.q.shape[1]
        return inputs.map(lambda x: jnp.pad(x, [(0, more if axis == 1 else 0) for axis in range(x.ndim)]))
    rows = inputs.q.shape[0]
    opened, count = {}, 0
    if tree is not None:
        opened = {"k": tree.open_k, "v": tree.open_v, "g": tree.open_g, "beta": tree.open_beta}
        count = layout.end.shape[0] // rows * tree.chunk_size
    source = layout.source

    def place(name: str, x: Array | None) -> Array | None:
        if x is None:
            return None
        before, shape = opened.get(name), (rows, count, *x.shape[2:])
        before = jnp.zeros(shape) if before is None else jnp.swapaxes(before, 1, 2).reshape(shape)
        zero = jnp.zeros((rows, 1, *x.shape[2:]), x.dtype)
        every = jnp.concatenate([before.astype(x.dtype), x, zero], 1)
        return jnp.take_along_axis(every, source.reshape(*source.shape, *(1,) * (x.ndim - 2)), 1)

    return Inputs(*(place(name, x) for name, x in zip(Inputs._fields, inputs)))  # type: ignore[arg-type]


def _slots_before(shape: tuple[int, ...], inputs: Inputs, state: State | None, rows: int, slots: int) -> Slots:
    """The slots of a state, or none; shape: of v in blocks."""
    groups, heads = shape[2:4]
    widths, wide = (inputs.q.shape[3], shape[-1]), numbers_of(inputs.v.dtype).wide
    if state is None:
        return empty_slots(rows, groups, heads, slots, widths, wide)
    if isinstance(state, LinearState):
        entries = state.state.astype(wide).reshape(rows, groups, heads, 1, *widths)
        return Slots(entries, jnp.zeros(entries.shape[:4], wide))
    state = state.with_slots(slots)
    entries, decay = (x.astype(wide).reshape(rows, groups, heads, *x.shape[2:]) for x in (state.entries, state.decay))
    return Slots(entries, decay)


def _state_after(placed: Inputs, bad: Array, past: Slots, state: State | None, layout: Layout, plan: Plan) -> State:
    """The state at the end of every sequence."""
    heads = placed.v.shape[2]
    entries, decay = (x.reshape(x.shape[0], heads, *x.shape[3:]) for x in past)
    if placed.level_scales is None:
        position = layout.end if state is None else layout.end + state.position
        spoiled = spoiled_sequences(bad, layout)
        return LinearState(position, spoil(entries[:, :, 0], spoiled))
    entries = spoil(entries, jnp.swapaxes(spoiled_slots(bad, layout, entries.shape[2]), 1, 2))
    inside = (
        plan.block // plan.chunk
    ).bit_length() - 1  # levels of chunks in a block; a state on its end has none of these
    entries, decay = (jnp.pad(x, [(inside if axis == 2 else 0, 0) for axis in range(x.ndim)]) for x in (entries, decay))
    live = jnp.arange(plan.chunk) < (layout.end % plan.chunk)[:, None]

    def opened(x: Array) -> Array:
        """The tokens of the open chunk, ``[sequences, heads, C, …]``."""
        at = layout.open_block[:, None] * plan.block + jnp.arange(plan.chunk)
        tokens = x[layout.row[:, None], jnp.minimum(at, x.shape[1] - 1)]
        mask = live.reshape(*live.shape, *(1,) * (x.ndim - 2))
        return jnp.swapaxes(jnp.where(mask, tokens, 0), 1, 2)

    _, k, v, g, beta, _ = placed
    assert g is not None  # check_inputs made one
    open_beta = None if beta is None else opened(beta)
    return LogLinearState(layout.end, entries, decay, opened(k), opened(v), opened(g), open_beta)
