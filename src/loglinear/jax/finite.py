"""FINITE: tokens with a NaN or an infinity are taken out before the products. The numbers that they spoil are NaN after
them.

Products with a mask read a whole block, and 0 · NaN is NaN: as it stands, such a token would reach the outputs before
it. Gradients of outputs before it are finite too. ``g = -inf`` is a reset, not a fault.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from loglinear.jax.inputs import Inputs
from loglinear.jax.layout import Layout


def without_bad_tokens(x: Inputs) -> tuple[Inputs, Array]:
    """k, v, g, beta with zeros for every token where one of them is not finite, and bool ``bad [rows, T, H]``."""
    bad_k = ~jnp.isfinite(x.k).all(-1)
    bad = ~jnp.isfinite(x.v).all(-1)
    bad = bad | jnp.repeat(bad_k, x.v.shape[2] // x.k.shape[2], axis=2)
    g, beta = x.g, x.beta
    if g is not None:
        right = g < jnp.inf  # False for NaN
        bad = bad | ~(right.all(-1) if x.per_channel else right)
    if beta is not None:
        bad = bad | ~jnp.isfinite(beta)
        beta = jnp.where(bad, 0.0, beta)
    if g is not None:
        g = jnp.where(bad[..., None] if x.per_channel else bad, 0.0, g)
    k, v = jnp.where(bad_k[..., None], 0.0, x.k), jnp.where(bad[..., None], 0.0, x.v)
    return x._replace(k=k, v=v, g=g, beta=beta), bad


def _before(bad: Array) -> Array:
    """Bad tokens before each place, ``[rows, places + 1, H]``."""
    return jnp.pad(jnp.cumsum(bad, 1, dtype=jnp.int32), ((0, 0), (1, 0), (0, 0)))


def spoiled_tokens(bad: Array, layout: Layout) -> Array:
    """Tokens ``[rows, places, H]`` at or behind a bad one of their sequence."""
    before, block = _before(bad), bad.shape[1] // layout.origin.shape[1]
    start = jnp.take_along_axis(before, (layout.origin * block)[..., None], 1)
    return before[:, 1:] > jnp.repeat(start, block, axis=1)


def spoiled_slots(bad: Array, layout: Layout, slots: int) -> Array:
    """Slots ``[sequences, M, H]`` that hold a bad token, or were carried over one: from their first closed block on."""
    before, block = _before(bad), bad.shape[1] // layout.origin.shape[1]
    last = layout.first + layout.open_block - layout.begin  # blocks closed at the end
    above = jnp.arange(1, slots + 1, dtype=jnp.int32)
    start = jnp.maximum((last[:, None] >> above << above) - layout.first[:, None], 0) + layout.begin[:, None]
    live = (last[:, None] >> (above - 1)) & 1 == 1
    found = before[layout.row[:, None], layout.open_block[:, None] * block] > before[layout.row[:, None], start * block]
    return found & live[..., None]


def spoiled_sequences(bad: Array, layout: Layout) -> Array:
    """Sequences ``[sequences, H]`` of a linear model with a bad token anywhere: its only slot holds all."""
    before, block = _before(bad), bad.shape[1] // layout.origin.shape[1]
    stop = jnp.append(layout.begin[1:], layout.origin.shape[1]) if layout.place is not None else layout.origin.shape[1]
    stop = jnp.broadcast_to(stop, layout.begin.shape)
    return before[layout.row, stop * block] > before[layout.row, layout.begin * block]


def spoil(x: Array, where: Array) -> Array:
    """x with NaN where ``where``, of as many leading axes, says; its gradients are zero there."""
    return jnp.where(where.reshape(*where.shape, *(1,) * (x.ndim - where.ndim)), jnp.nan, x)
