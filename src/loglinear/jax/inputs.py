"""INPUTS: the arrays of one call, as the caller gave them and with the heads of a group side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from loglinear.jax.span import Tokens, numbers_of


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

    def grouped(self) -> Tokens:
        """Heads as ``[g, r]``: with a gate for each head alone, r heads share q and k; otherwise each has its own."""
        q, k, v, g, beta, scales = self
        heads = v.shape[2]
        shared = beta is None and not self.per_channel
        if not shared:
            q, k = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (q, k))
        groups = q.shape[2]
        split = lambda x: x.reshape(*x.shape[:2], groups, heads // groups, *x.shape[3:])  # noqa: E731
        gate = jnp.zeros(v.shape[:3], numbers_of(v.dtype).wide) if g is None else g
        return Tokens(
            q,
            k,
            split(v),
            split(gate),
            None if beta is None else split(beta),
            None if scales is None else split(scales),
        )
