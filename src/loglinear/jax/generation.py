"""GENERATION: prompts, their states, and then a token a step in one compiled loop."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax


class Choice(NamedTuple):
    """How a token is chosen from logits, and what ends a row."""

    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    ends: tuple[int, ...]
    pad: int

    def of(self, logits: Array, key: Array) -> Array:
        """int32 ``[B]`` of logits ``[B, vocab_size]``."""
        if not self.do_sample:
            return logits.argmax(-1).astype(jnp.int32)
        logits = logits.astype(jnp.float32) / self.temperature
        if self.top_k is not None:
            least = lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p is not None:
            order = jnp.sort(logits, axis=-1, descending=True)
            chance = jax.nn.softmax(order, -1)
            inside = chance.cumsum(-1) - chance < self.top_p  # the first one always
            least = jnp.where(inside, order, jnp.inf).min(-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits).astype(jnp.int32)


def continued(
    model: Any,
    ids: Array,
    mask: Array | None,
    tokens: int,
    ends: tuple[int, ...],
    pad: int | None,
    *,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    key: Array | None,
) -> Array:
    """``LogLinearForCausalLM.generate``."""
    if ids.ndim != 2 or ids.shape[1] < 1:
        raise ValueError(f"input_ids must have shape [B, T] with T of at least 1: got {list(ids.shape)}")
    if tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1: got {tokens}")
    if do_sample and key is None:
        raise ValueError("key must be given where do_sample is true: got None")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive: got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1: got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1: got {top_p}")
    if mask is not None and not np.asarray(mask).any(1).all():
        raise ValueError("attention_mask must have a token in every row: got a row of padding")
    pad = pad if pad is not None else ends[0] if ends else 0
    choice = Choice(do_sample, temperature, top_k, top_p, ends, pad)
    run: Any = _run
    new, count = run(model, ids, mask, jax.random.key(0) if key is None else key, tokens, choice)
    return jnp.concatenate([ids, new[:, : int(count)].astype(ids.dtype)], 1)


@partial(nnx.jit, static_argnums=(4, 5))
def _run(model: Any, ids: Array, mask: Array | None, key: Array, tokens: int, choice: Choice) -> tuple[Array, Array]:
    """New tokens ``[B, tokens]``, and how many of these columns were made."""
    rows, length = ids.shape
    states = model.empty_states(rows, length + tokens)
    logits, states = model(ids, states, output_states=True, attention_mask=mask)
    at = jnp.full(rows, length - 1) if mask is None else length - 1 - jnp.argmax(mask[:, ::-1] != 0, 1)
    logits = jnp.take_along_axis(logits, at[:, None, None], 1)[:, 0]
    ends = jnp.asarray(choice.ends, jnp.int32)
    out = jnp.full((rows, tokens), choice.pad, jnp.int32)

    def going(carry: tuple[Any, ...]) -> Array:
        i, _, _, done, _ = carry
        return (i < tokens) & ~done.all()

    def put(i: Array, logits: Array, done: Array, out: Array) -> tuple[Array, Array, Array]:
        token = jnp.where(done, choice.pad, choice.of(logits, jax.random.fold_in(key, i)))
        done = done | (token[:, None] == ends).any(1)
        return token, done, out.at[:, i].set(token)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, token, states, done, out = carry
        logits, states = model(token[:, None], states, output_states=True)
        token, done, out = put(i, logits[:, 0], done, out)
        return i + 1, token, states, done, out

    token, done, out = put(jnp.int32(0), logits, jnp.zeros(rows, bool), out)
    count, *_, out = lax.while_loop(going, body, (jnp.int32(1), token, states, done, out))
    return out, count
