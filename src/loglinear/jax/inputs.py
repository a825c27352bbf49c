"""INPUTS: the arrays of one call, as the caller gave them and with the heads of a group side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from loglinear.jax.products import numbers_of
from loglinear.jax.span import Tokens


def known(x: Any) -> bool:
    """Whether the values of x may be read: not inside of ``jax.jit`` and its kin."""
    return not isinstance(x, jax.core.Tracer)


class Inputs(NamedTuple):
    """q, k ``[B, T, G, K]``, v ``[B, T, H, V]``, g ``[B, T, H]`` or ``[B, T, H, K]``, beta ``[B, T, H]``, λ
    ``[B, T, H, L]``.
    """

    q: Array
    k: Array
    v: Array
    g: Array | None
    beta: Array | None
    level_scales: Array | None

    @property
    def per_channel(self) -> bool:
        """Whether g has a value for each key channel."""
        return self.g is not None and self.g.ndim == 4

    @property
    def transition(self) -> str:
        """The name of the transition, in messages."""
        if self.beta is None:
            return "gate per channel" if self.per_channel else "scalar gate"
        return "delta rule with a gate per channel" if self.per_channel else "delta rule"

    def map(self, change: Callable[[Array], Array]) -> Inputs:
        """``change`` of every array."""
        return Inputs(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]

    def flat(self) -> Inputs:
        """The rows one behind the other, as one row."""
        return self.map(lambda x: x.reshape(1, -1, *x.shape[2:]))

    def blocks(self, number: int, size: int) -> Tokens:
        """``number`` blocks of chunks of ``size`` tokens, a leading axis, with heads as ``[g, r]``: with a gate for each
        head alone, r heads share q and k; otherwise each has its own.
        """
        q, k, v, g, beta, scales = self
        heads = v.shape[2]
        shared = beta is None and not self.per_channel
        if not shared:
            q, k = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (q, k))
        groups = q.shape[2]
        gate = jnp.zeros(v.shape[:3], numbers_of(v.dtype).wide) if g is None else g

        def cut(x: Array, *heads: int) -> Array:
            """``[p, T, H, …] -> [N, p, heads…, n, C, …]``."""
            x = x.reshape(x.shape[0], number, x.shape[1] // (number * size), size, *heads, *x.shape[3:])
            last = 4 + len(heads)
            return x.transpose(1, 0, *range(4, last), 2, 3, *range(last, x.ndim))

        by_head = lambda x: cut(x, groups, heads // groups)  # noqa: E731
        beta, scales = (None if x is None else by_head(x) for x in (beta, scales))
        return Tokens(cut(q, groups), cut(k, groups), by_head(v), by_head(gate), beta, scales)


def in_order(out: Array) -> Array:
    """Outputs of blocks, ``[N, p, g, r, T, V]``, as ``[p, N · T, H, V]``."""
    number, rows, groups, heads, length, width = out.shape
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(rows, number * length, groups * heads, width)
