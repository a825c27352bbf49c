"""STEP: one token of every row against a state of fixed shapes, for ``jax.jit`` and inside of ``jax.lax.scan``.

A step reads the buckets and the open chunk, and appends the token. Only a step that fills a chunk makes its state and
carries.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from loglinear.jax import checks
from loglinear.jax.inputs import Inputs, known
from loglinear.jax.ops import attend, unit
from loglinear.jax.products import Numbers, numbers_of
from loglinear.jax.scan import Place, Slots, carried
from loglinear.jax.span import LEAST_LOG, Gate, Tokens, chunk_spans, inverse_of_unit_lower
from loglinear.jax.state import LinearState, LogLinearState, State, slots_for


def log_linear_attention_step(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    level_scales: Array | None,
    state: State,
    scale: float | None = None,
) -> tuple[Array, State]:
    """The next token of each row: what ``log_linear_attention`` gives when it goes on from ``state``, in a fraction of
    its work.

    Args:
        q, k, v, g, level_scales, scale: as in ``log_linear_attention``, T = 1.
        state: one row per row of the batch, each at its own position, with slots for the token
            (``LogLinearState.with_slots``).

    Returns:
        o ``[B, 1, H, V]`` in the dtype of v, and the state behind the token, of the same shapes. A row without a slot
        for what it closes goes on with NaN.

    Raises:
        TypeError, ValueError: an argument does not fit; outside of ``jit`` also where the state has too few slots.
    """
    return _checked(Inputs(q, k, v, g, None, level_scales), state, scale)


def log_linear_delta_rule_step(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    beta: Array,
    level_scales: Array | None,
    state: State,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Array, State]:
    """The same for ``log_linear_delta_rule``."""
    if beta is None:
        raise TypeError("beta must be an array [B, 1, H]: got None")
    if use_qk_l2norm_in_kernel:
        q, k = unit(q, "q"), unit(k, "k")
    return _checked(Inputs(q, k, v, g, beta, level_scales), state, scale)


def _checked(inputs: Inputs, state: State, scale: float | None) -> tuple[Array, State]:
    inputs, scale = checks.check_inputs(inputs), checks.check_scale(scale)
    if inputs.q.shape[1] != 1:
        raise ValueError(f"q must hold one token of each row, T = 1: got T={inputs.q.shape[1]}")
    if state is None:
        raise TypeError("state must be a LogLinearState or a LinearState: got None")
    checks.check_state(state, inputs, inputs.q.shape[0])
    if isinstance(state, LinearState):
        o, after = attend(*inputs, scale, state, True)
        assert after is not None
        return o, after
    if known(state.position) and state.position.size:
        last, size = int(np.asarray(state.position).max()) + 1, state.chunk_size
        if slots_for(last, size) > state.entries.shape[2]:
            raise ValueError(
                f"state must have {slots_for(last, size)} slots for {last} tokens (with_slots gives it more): "
                f"got {state.entries.shape[2]}"
            )
    return _step(inputs, state, scale)


@partial(jax.jit, static_argnums=2)
def _step(inputs: Inputs, state: LogLinearState, scale: float) -> tuple[Array, LogLinearState]:
    num, size = numbers_of(inputs.v.dtype), state.chunk_size
    used = state.position % size
    row = jnp.arange(used.shape[0])

    def append(opened: Array | None, x: Array | None) -> Array | None:
        return None if opened is None or x is None else opened.at[row, :, used].set(x[:, 0].astype(opened.dtype))

    names = {"open_k": inputs.k, "open_v": inputs.v, "open_g": inputs.g, "open_beta": inputs.beta}
    opened = {name: append(getattr(state, name), x) for name, x in names.items()}
    # The tokens of the open chunk [B, C, …], whose last live one asks; q and λ are of that one alone.
    k, v, g, beta = (None if x is None else jnp.swapaxes(x, 1, 2) for x in opened.values())
    assert k is not None
    assert v is not None
    assert inputs.level_scales is not None
    chunk = Inputs(inputs.q, k, v, g, beta, inputs.level_scales)
    chunk = chunk._replace(q=jnp.broadcast_to(inputs.q, chunk.k.shape), level_scales=None)
    tokens = jax.tree.map(lambda x: x[0], chunk.blocks(1, size))
    groups, heads = tokens.v.shape[1:3]
    past = Slots(*(x.astype(num.wide).reshape(-1, groups, heads, *x.shape[2:]) for x in (state.entries, state.decay)))
    scales = inputs.level_scales[:, 0].reshape(-1, groups, heads, inputs.level_scales.shape[3]).astype(num.wide)
    out = scale * _look(tokens, past, scales, used, num)
    o = out.reshape(inputs.v.shape).astype(inputs.v.dtype)

    def close(past: Slots) -> Slots:
        spans = chunk_spans(tokens, num)
        place = Place(jnp.int32(0), jnp.zeros((), bool), state.position // size, used == size - 1)
        return carried(past, spans.map, spans.state, place, False, num)

    past = lax.cond((used == size - 1).any(), close, lambda past: past, past)
    entries, decay = (x.reshape(y.shape).astype(y.dtype) for x, y in zip(past, (state.entries, state.decay)))

    def kept(x: Array | None) -> Array | None:
        if x is None:
            return None
        return jnp.where((used == size - 1).reshape(-1, *(1,) * (x.ndim - 1)), 0, x).astype(x.dtype)

    return o, LogLinearState(state.position + 1, entries, decay, **{name: kept(x) for name, x in opened.items()})  # type: ignore[arg-type]


def _look(x: Tokens, past: Slots, scales: Array, used: Array, num: Numbers) -> Array:
    """The view of the last live token of each open chunk, ``[B, g, r, V]``; its decays end with it, because later ones
    are zero.
    """
    size, last = x.v.shape[-2], scales.shape[-1] - 1
    q, k, v = x.q[:, :, 0, 0], x.k[:, :, 0], x.v[:, :, :, 0]
    per_channel = x.gate.ndim == 6
    logs = jnp.maximum(x.gate[:, :, :, 0].astype(num.wide), LEAST_LOG)
    gate = Gate(logs[:, :, 0] if per_channel else logs, per_channel, num)
    to_end, start = jnp.exp(gate.to_end()), gate.from_start()
    weight = jnp.zeros((), num.wide)
    rows = q
    if per_channel:
        pairs = num.product("pgk,pgsk->pgs", q, k * to_end)[:, :, None]
        rows = q * jnp.exp(start[..., -1, :])
    else:
        pairs = num.product("pgk,pgsk->pgs", q, k)[:, :, None] * to_end
        weight = start[..., -1]
    if x.beta is not None:
        beta = x.beta[:, :, 0, 0].astype(num.wide)
        if per_channel:
            overlap, seen = gate.scores(k, k), jnp.exp(start)
        else:
            overlap = num.product("pgtk,pgsk->pgts", k, k) * gate.decays()[:, :, 0]
            seen, rows, weight = jnp.exp(start)[:, :, 0, :, None], q * jnp.exp(weight), jnp.zeros((), num.wide)
        solve = inverse_of_unit_lower(beta[..., None] * jnp.tril(overlap, -1)) * beta[..., None, :]
        pairs = num.product("pgrs,pgsu->pgru", pairs, solve)
        rows = rows - num.product("pgs,pgsk->pgk", pairs[:, :, 0], k * seen)
    token = jnp.arange(size, dtype=jnp.int32)
    level = jnp.where(token <= used[:, None], 32 - lax.clz(token ^ used[:, None]), 0)
    by_token = jnp.take_along_axis(scales, jnp.minimum(level, last)[:, None, None, :], -1)
    out = num.product("pgrs,pgrsv->pgrv", pairs * by_token, v)
    levels = np.minimum(size.bit_length() + np.arange(past.decay.shape[3]), last)
    factor = scales[..., levels] * jnp.exp(weight[..., None] + past.decay)
    read = num.product("pgk,pgrmkv->pgrmv", rows, past.entries)
    return out + (factor[..., None] * read).sum(3)
