"""ATTENTION in Flax NNX: causal softmax attention with rotary positions, the other half of hybrids.

It keeps keys and values of every token, in memory of a fixed size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from loglinear.jax.inputs import known
from loglinear.jax.layers import Linear, MixerState, Past, positions, rotary, split_heads


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVState:
    """Keys and values ``[B, S, heads, W]`` of up to S tokens, and the position ``[B]`` of each row: tokens so far."""

    position: Array
    keys: Array
    values: Array

    def with_room(self, tokens: int) -> KVState:
        """This state with room for at least so many tokens."""
        more = max(tokens - self.keys.shape[1], 0)
        pad = lambda x: jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))  # noqa: E731
        return dataclasses.replace(self, keys=pad(self.keys), values=pad(self.values))


class SoftmaxAttention(nnx.Module):
    """Arguments as of ``loglinear.layers.SoftmaxAttention``; std: of the projections at the start."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        rope_theta: float = 500_000.0,
        *,
        rngs: nnx.Rngs,
        std: float = 0.02,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(num_heads, num_kv_heads) < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a positive multiple of num_kv_heads={num_kv_heads}: got {num_heads}")
        if head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary positions turn pairs): got {head_dim}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rope_theta = rope_theta
        heads, shared = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = Linear(hidden_size, heads, std=std, rngs=rngs)
        self.k_proj, self.v_proj = (Linear(hidden_size, shared, std=std, rngs=rngs) for _ in range(2))
        self.out_proj = Linear(heads, hidden_size, std=std, rngs=rngs)

    def __call__(self, hidden: Array, past: Past = Past()) -> tuple[Array, MixerState | None]:  # noqa: B008
        """Mix hidden ``[B, T, hidden_size]`` along T.

        Outputs of a row that outgrows its state are NaN; where positions are known it is a ValueError.
        """
        rows, length = hidden.shape[:2]
        count = jnp.full(rows, length, jnp.int32) if past.lengths is None else past.lengths.astype(jnp.int32)
        if past.state is not None:
            _check_room(past.state.memory, count)
        place = positions(hidden, past)
        q = split_heads(self.q_proj(hidden), self.num_heads)
        k, v = (split_heads(proj(hidden), self.num_kv_heads) for proj in (self.k_proj, self.v_proj))
        q, k = (rotary(x, place, self.rope_theta) for x in (q, k))
        if past.state is None:
            same = jnp.tril(jnp.ones((length, length), bool))[None]
            if past.documents is not None:
                number = past.documents.numbers()
                same = same & (number[:, :, None] == number[:, None])
            out, state = _softmax(q, k, v, same), KVState(count, k, v)
        else:
            out, state = _going_on(past.state.memory, q, k, v, place, count)
        out = self.out_proj(out.reshape(rows, length, -1))
        return out, MixerState(state, jnp.zeros((rows, 0, 0), hidden.dtype)) if past.output else None

    def empty_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> MixerState:
        """The state before the first token, with room for ``max_length``."""
        room = jnp.zeros((batch, max_length, self.num_kv_heads, self.head_dim), dtype)
        return MixerState(KVState(jnp.zeros(batch, jnp.int32), room, room), jnp.zeros((batch, 0, 0), dtype))


def _check_room(state: KVState, count: Array) -> None:
    room, end = state.keys.shape[1], state.position + count
    if known(end) and room < int(end.max(initial=0)):
        raise ValueError(f"state must have room for {int(end.max())} tokens (with_room makes it): got {room}")


def _going_on(state: KVState, q: Array, k: Array, v: Array, place: Array, count: Array) -> tuple[Array, KVState]:
    """Attention of new tokens at ``place [B, T]``, of which each row has ``count``, and the state behind them.

    Padding leaves numbers behind the last token of a row. They are written over before a query sees them.
    """
    room, end = state.keys.shape[1], state.position + count
    row = jnp.arange(place.shape[0])[:, None]
    put = lambda x, new: x.at[row, place].set(new.astype(x.dtype), mode="drop")  # noqa: E731
    state = KVState(end, put(state.keys, k), put(state.values, v))
    visible = jnp.arange(room) <= place[..., None]
    out = _softmax(q, state.keys.astype(q.dtype), state.values.astype(q.dtype), visible)
    return jnp.where((end > room)[:, None, None, None], jnp.nan, out), state


def _softmax(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """Attention ``[B, T, heads, W]`` of each query to the keys that ``visible [B or 1, T, S]`` says."""
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None])
