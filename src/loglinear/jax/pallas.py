"""PALLAS: the stage of the scalar gate that costs most, as a TPU kernel: a chunk's masked attention, and the state that
it adds.

One program has one chunk of one head. The C × C scores, decays and λ never leave the chip's vector memory; in XLA's
form they are the largest arrays of the forward pass. The backward pass is XLA's. Without a TPU the kernel is
interpreted, which is for tests.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from loglinear.jax.products import Numbers
from loglinear.jax.span import Gate, levels_of, weigh


def _dot(a: Array, b: Array, contract: tuple[int, int], low: jnp.dtype) -> Array:
    """A product of matrices over axis ``contract`` of each, of factors rounded to ``low``, in float32."""
    precision = lax.Precision.DEFAULT if low == jnp.bfloat16 else lax.Precision.HIGHEST
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a.astype(low), b.astype(low), axes, precision=precision, preferred_element_type=jnp.float32)


def _kernel(q_ref, k_ref, v_ref, g_ref, scales_ref, pairs_ref, rows_ref, columns_ref, out_ref, state_ref, *, low):
    """Blocks: q, k ``[C, K]``, v ``[C, V]``, g ``[1, C]`` logs, λ ``[C, L]``; constants ``[L, C, C]``: those of ``Levels``."""
    g, v, scales = g_ref[...], v_ref[...], scales_ref[...]
    levels, size, _ = pairs_ref.shape
    log = mask = seen = jnp.zeros((size, size), jnp.float32)
    for level in range(levels):
        pair = pairs_ref[level]
        to = _dot(rows_ref[level], g, (1, 1), jnp.dtype(jnp.float32))  # [C, 1]
        past = _dot(g, columns_ref[level], (1, 1), jnp.dtype(jnp.float32))  # [1, C]
        log, mask, seen = log + pair * (to + past), mask + pair * scales[:, level : level + 1], seen + pair
    scores = _dot(q_ref[...], k_ref[...], (1, 1), low) * (seen * jnp.exp(log)) * mask
    out_ref[...] = _dot(scores, v, (1, 0), low)
    later = lax.broadcasted_iota(jnp.int32, (size, size), 0) < lax.broadcasted_iota(jnp.int32, (size, size), 1)
    to_end = jnp.exp(_dot(later.astype(jnp.float32), g, (1, 1), jnp.dtype(jnp.float32)))
    state_ref[...] = _dot(k_ref[...], v.astype(jnp.float32) * to_end, (0, 0), low)


def _call(
    q: Array, k: Array, v: Array, logs: Array, scales: Array, low: jnp.dtype, interpret: bool
) -> tuple[Array, Array]:
    p, g, r, n, size, width = v.shape
    key_dim, constants = q.shape[-1], tuple(map(jnp.asarray, levels_of(size)))
    levels = constants[0].shape[0]
    by_group = lambda *axes: pl.BlockSpec((None, None, None, *axes), lambda i, j, h, m: (i, j, m, 0, 0))  # noqa: E731
    by_head = lambda *axes: pl.BlockSpec((None, None, None, None, *axes), lambda i, j, h, m: (i, j, h, m, 0, 0))  # noqa: E731
    everywhere = pl.BlockSpec((levels, size, size), lambda i, j, h, m: (0, 0, 0))
    shape = lambda *axes: jax.ShapeDtypeStruct((p, g, r, n, *axes), jnp.float32)  # noqa: E731
    return pl.pallas_call(
        partial(_kernel, low=low),
        out_shape=(shape(size, width), shape(key_dim, width)),
        grid=(p, g, r, n),
        in_specs=[by_group(size, key_dim)] * 2
        + [by_head(size, width), by_head(1, size), by_head(size, levels)]
        + [everywhere] * 3,
        out_specs=(by_head(size, width), by_head(key_dim, width)),
        interpret=interpret,
    )(q, k, v, logs[..., None, :], scales, *constants)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def chunk_outputs(q: Array, k: Array, v: Array, logs: Array, scales: Array, num: Numbers) -> tuple[Array, Array]:
    """The outputs ``[p, g, r, n, C, V]`` of every chunk's own tokens, and the states ``[p, g, r, n, K, V]`` that they
    add; float32.

    Args:
        q, k: ``[p, g, n, C, K]``. v: ``[p, g, r, n, C, V]``. logs: the gate ``[p, g, r, n, C]``, at least ``LEAST_LOG``.
        scales: λ ``[p, g, r, n, C, L]`` of the L = log2(C) + 1 levels of a chunk.
    """
    forms = {name: partial(_call, low=num.low, interpret=name != "tpu") for name in ("tpu", "default")}
    return lax.platform_dependent(q, k, v, logs, scales, **forms)


def plain_chunk_outputs(q: Array, k: Array, v: Array, logs: Array, scales: Array, num: Numbers) -> tuple[Array, Array]:
    """The same in XLA's form."""
    gate = Gate(logs, False, num)
    scores = num.product("pgntk,pgnsk->pgnts", q, k)[:, :, None] * gate.decays()
    out = num.product("pgrnts,pgrnsv->pgrntv", weigh(scores, scales, logs.shape[-1]), v)
    return out, num.product("pgntk,pgrntv->pgrnkv", k, v * jnp.exp(gate.to_end())[..., None])


def _forward(q, k, v, logs, scales, num):  # type: ignore[no-untyped-def]
    return chunk_outputs(q, k, v, logs, scales, num), (q, k, v, logs, scales)


def _backward(num, kept, gradients):  # type: ignore[no-untyped-def]
    return jax.vjp(partial(plain_chunk_outputs, num=num), *kept)[1](gradients)


chunk_outputs.defvjp(_forward, _backward)
