"""STATE: the past of a sequence for decoding, as pytrees of arrays of fixed shapes, in the layout of the PyTorch side's
states.

A state carries a *position per row*: rows of one batch may stand at different positions. B rows, M slots, H value
heads, G q/k groups, K, V widths, C chunk size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

CHUNK_SIZE = 64  # tokens per leaf of the tree in every state, as on the PyTorch side


def slots_for(length: int, chunk_size: int = CHUNK_SIZE) -> int:
    """Slots that a state needs for sequences of up to so many tokens."""
    return (length // chunk_size).bit_length()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearState:
    """State of the plain linear model after ``position`` tokens (int32 ``[B]``): one matrix ``state [B, H, K, V]``."""

    position: Array
    state: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogLinearState:
    """State of log-linear attention after ``position`` tokens: O(log T) buckets and the raw tokens of the open chunk.

    Slot m of ``entries`` holds the bucket of ``2**m`` closed chunks on the query path of chunk ``position // C`` and is
    live exactly when bit m of that integer is set. A live bucket is ``exp(decay) · entries``, seen from the end of the
    last closed chunk.

    A compiled function cannot add slots. ``with_slots(slots_for(length))`` makes room for sequences of ``length``
    tokens; a sequence that outgrows its slots gives NaN.

    Attributes:
        position: int32 ``[B]``, tokens seen by each row.
        entries: float32 (float64 in float64) ``[B, H, M, K, V]``; dead slots hold zeros.
        decay: ``[B, H, M]``, natural log, of the same dtype.
        open_k: ``[B, G, C, K]``, open_v: ``[B, H, C, V]``, open_g: ``[B, H, C]`` or ``[B, H, C, K]`` (log decay),
            open_beta: ``[B, H, C]`` or None (no delta rule); token i of the open chunk is live when
                ``i < position % C``, others hold zeros.
    """

    position: Array
    entries: Array
    decay: Array
    open_k: Array
    open_v: Array
    open_g: Array
    open_beta: Array | None = None

    @property
    def chunk_size(self) -> int:
        """C, a power of two."""
        return self.open_k.shape[2]

    def with_slots(self, slots: int) -> LogLinearState:
        """This state with at least so many slots; those that are added are dead."""
        more = max(slots - self.entries.shape[2], 0)
        pad = lambda x: jnp.pad(x, [(0, more if axis == 2 else 0) for axis in range(x.ndim)])  # noqa: E731
        return dataclasses.replace(self, entries=pad(self.entries), decay=pad(self.decay))


State = LogLinearState | LinearState


def empty_state(
    batch: int,
    groups: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    max_length: int,
    *,
    dtype: Any = jnp.float32,
    delta_rule: bool = False,
    per_channel: bool = False,
    chunk_size: int = CHUNK_SIZE,
) -> LogLinearState:
    """The state before the first token, with slots for ``max_length`` tokens.

    Args:
        batch, groups, heads, key_dim, value_dim: B, G, H, K, V. dtype: of q, k and v.
        delta_rule, per_channel: whether the op is ``log_linear_delta_rule``; whether g has a value for each key channel.
        chunk_size: C, a power of two.
    """
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    slots = slots_for(max_length, chunk_size)
    gate = (batch, heads, chunk_size, key_dim) if per_channel else (batch, heads, chunk_size)
    return LogLinearState(
        position=jnp.zeros(batch, jnp.int32),
        entries=jnp.zeros((batch, heads, slots, key_dim, value_dim), wide),
        decay=jnp.zeros((batch, heads, slots), wide),
        open_k=jnp.zeros((batch, groups, chunk_size, key_dim), dtype),
        open_v=jnp.zeros((batch, heads, chunk_size, value_dim), dtype),
        open_g=jnp.zeros(gate, wide),
        open_beta=jnp.zeros((batch, heads, chunk_size), wide) if delta_rule else None,
    )
