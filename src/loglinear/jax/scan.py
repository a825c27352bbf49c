"""SCAN: block after block, with the buckets of the past as digits of a binary counter.

One step takes a block of some rows: its own outputs (``span.block_span``), what its queries read in the M slots of the
past, and the counter's carry. Slot m holds the bucket of ``2**m`` blocks, so M grows with log T and the program does
not: blocks and slots are loops. The derivative keeps the arguments and the slots before each step, and makes everything
    else again.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from loglinear.jax.products import Numbers
from loglinear.jax.span import Tokens, act, block_span, read


class Sizes(NamedTuple):
    """The facts on which a compilation depends besides shapes. num: dtypes. scale: of the outputs."""

    num: Numbers
    scale: float = 1.0


class Slots(NamedTuple):
    """Buckets of the past, seen from the start of the next block: ``exp(decay) · entries``.

    entries ``[rows, g, r, M, K, V]``; decay ``[rows, g, r, M]``, which is used where a span's map is one log.
    """

    entries: Array
    decay: Array


class Place(NamedTuple):
    """Where a step's blocks stand: integers. row ``[]``, the first of the p rows of ``Slots`` that the step takes;
    fresh ``[]``, whether their past is empty; number ``[p]``, that of the block in its sequence; whole ``[p]``,
    whether the block is complete.
    """

    row: Array
    fresh: Array
    number: Array
    whole: Array


def empty_slots(rows: int, groups: int, heads: int, slots: int, widths: tuple[int, int], dtype: Any) -> Slots:
    """No past at all. heads: r, of a group."""
    axes = (rows, groups, heads, slots)
    return Slots(jnp.zeros((*axes, *widths), dtype), jnp.zeros(axes, dtype))


def step(sizes: Sizes, past: Slots, x: Tokens, place: Place) -> tuple[Array, Slots]:
    """The outputs ``[p, g, r, T, V]`` of one block of each row, and the slots after it."""
    num = sizes.num
    span = block_span(x, num)
    slots, length = past.entries.shape[3], span.rows.shape[3]
    first_level = length.bit_length()
    scales = None
    if x.scales is not None:
        scales = x.scales.reshape(*x.scales.shape[:3], 1, length, x.scales.shape[-1]).astype(num.wide)

    def look(out: Array, slot: tuple[Array, ...]) -> tuple[Array, None]:
        m, entry, decay = slot
        factor = jnp.ones(out.shape[:5], num.wide)
        if scales is not None:
            at = jnp.minimum(first_level + m, scales.shape[-1] - 1)
            factor = lax.dynamic_index_in_dim(scales, at, 5, keepdims=False)
        if span.weight is not None:
            factor = factor * jnp.exp(span.weight + decay[..., None, None])
        return out + read(span.rows, factor, entry[:, :, :, None], num), None

    numbers = jnp.arange(slots, dtype=jnp.int32)
    by_slot = (numbers, *(jnp.moveaxis(y, 3, 0) for y in past))
    out, _ = lax.scan(look, span.out, by_slot)
    after = carried(past, span.map, span.state, place, x.scales is None, num)
    return sizes.scale * out[:, :, :, 0], after


def carried(past: Slots, map: Array, state: Array, place: Place, linear: bool, num: Numbers) -> Slots:
    """The slots after a block with this map and state, where it is whole; a linear model has one slot, which takes
    everything.
    """
    by_log = map.ndim == state.ndim - 2
    if by_log:
        moved = Slots(past.entries, past.decay + map)
    else:
        moved = Slots(act(map, past.entries, Numbers(num.wide, num.wide)), past.decay)
    if linear:
        return Slots(jnp.exp(moved.decay)[..., None, None] * moved.entries + state, jnp.zeros_like(moved.decay))
    slots = past.entries.shape[3]
    digit = jnp.left_shift(1, jnp.arange(slots, dtype=jnp.int32))
    count = place.number + 1
    low = (count & -count)[:, None]  # blocks in the bucket that this block completes
    below, at = (x[:, None, None] & place.whole[:, None, None, None] for x in (digit < low, digit == low))
    values = jnp.exp(moved.decay)[..., None, None] * moved.entries
    bucket = state + jnp.where(below[..., None, None], values, 0.0).sum(3, keepdims=True)
    # A sequence longer than its slots can hold gives NaN, and no wrong number.
    lost = (place.whole & (low[:, 0] >= 1 << slots))[:, None, None, None]
    open_ = ~place.whole[:, None, None, None]
    kept = jnp.where(open_[..., None, None], past.entries, moved.entries)
    entries = jnp.where(at[..., None, None], bucket, jnp.where(below[..., None, None], 0.0, kept))
    decay = jnp.where(at | below, 0.0, jnp.where(open_, past.decay, moved.decay))
    return Slots(jnp.where(lost[..., None, None], jnp.nan, entries), decay)


def _rows(past: Slots, place: Place, count: int) -> Slots:
    """The rows of a step."""
    return jax.tree.map(lambda x: jnp.where(place.fresh, 0.0, lax.dynamic_slice_in_dim(x, place.row, count, 0)), past)


def _put(past: Slots, rows: Slots, place: Place) -> Slots:
    return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), place.row, 0), past, rows)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(sizes: Sizes, past: Slots, x: Tokens, places: Place) -> tuple[Array, Slots]:
    """All steps: ``Tokens`` and ``Place`` with a leading axis of steps to outputs with that axis, and the slots at the
    end.
    """
    out, past, _ = _forward(sizes, past, x, places)
    return out, past


def _forward(sizes: Sizes, past: Slots, x: Tokens, places: Place) -> tuple[Array, Slots, Slots]:
    def body(past: Slots, at: tuple[Tokens, Place]) -> tuple[Slots, tuple[Array, Slots]]:
        tokens, place = at
        before = _rows(past, place, tokens.q.shape[0])
        out, after = step(sizes, before, tokens, place)
        return _put(past, after, place), (out.astype(tokens.v.dtype), before)

    past, (out, before) = lax.scan(body, past, (x, places))
    return out, past, before


def _run_forward(sizes: Sizes, past: Slots, x: Tokens, places: Place) -> tuple[tuple[Array, Slots], Any]:
    out, past, before = _forward(sizes, past, x, places)
    return (out, past), (x, places, before)


def _run_backward(sizes: Sizes, kept: Any, gradients: tuple[Array, Slots]) -> tuple[Slots, Tokens, None]:
    def body(d_past: Slots, at: tuple[Tokens, Place, Slots, Array]) -> tuple[Slots, Tokens]:
        tokens, place, before, d_out = at
        count = tokens.q.shape[0]
        _, pull = jax.vjp(lambda past, x: step(sizes, past, x, place), before, tokens)
        d_before, d_tokens = pull(
            (d_out.astype(sizes.num.wide), _rows(d_past, place._replace(fresh=jnp.zeros((), bool)), count))
        )
        d_before = jax.tree.map(lambda y: jnp.where(place.fresh, 0.0, y), d_before)
        return _put(d_past, d_before, place), d_tokens

    d_out, d_past = gradients
    d_past, d_tokens = lax.scan(body, d_past, (*kept, d_out), reverse=True)
    return d_past, d_tokens, None


run.defvjp(_run_forward, _run_backward)
