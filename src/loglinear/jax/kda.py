"""KDA in Flax NNX: the Log-Linear Kimi Delta Attention mixer, the delta rule with a decay for each key channel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from loglinear.jax.layers import (
    LevelScale,
    Linear,
    Mixer,
    RMSNorm,
    ShortConvolution,
    ends,
    initial_dt_bias,
    split_heads,
    wide,
)
from loglinear.jax.ops import unit


class LogLinearKDA(Mixer):
    """Log-Linear KDA. Arguments as of ``loglinear.layers.LogLinearKDA``; std: of the projections at the start.

    Source: Kimi Team 2025, section 3 and 4; Guo et al. 2025, section 3.4 (levels).
    """

    delta_rule = per_channel = True

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        num_key_heads: int | None = None,
        num_levels: int = 15,
        conv_width: int = 4,
        norm_eps: float = 1e-6,
        log_linear: bool = True,
        level_scale_start: str = "paper",
        *,
        conv_bias: bool = False,
        decay_rank: int | None = None,
        gate_rank: int | None = None,
        gate_bias: bool = False,
        decay_bound: float | None = None,
        neg_eigval: bool = False,
        rngs: nnx.Rngs,
        std: float = 0.02,
    ) -> None:
        num_key_heads = num_heads if num_key_heads is None else num_key_heads
        if min(num_heads, num_key_heads) < 1 or num_heads % num_key_heads:
            raise ValueError(f"num_heads must be a positive multiple of num_key_heads={num_key_heads}: got {num_heads}")
        if decay_bound is not None and decay_bound >= 0:
            raise ValueError(f"decay_bound must be negative, the log of a decay: got {decay_bound}")
        decay_rank, gate_rank = (value_dim if rank is None else rank for rank in (decay_rank, gate_rank))
        if min(decay_rank, gate_rank) < 0:
            raise ValueError(f"decay_rank and gate_rank must be at least 0: got {decay_rank} and {gate_rank}")
        if gate_bias and not gate_rank:
            raise ValueError("gate_bias must be false where the output gate is one matrix (gate_rank 0): got True")
        self.num_heads, self.num_key_heads, self.widths = num_heads, num_key_heads, (key_dim, value_dim)
        self.decay_bound, self.neg_eigval = decay_bound, neg_eigval
        keys, values, decays = num_key_heads * key_dim, num_heads * value_dim, num_heads * key_dim
        self.conv_widths = (keys, keys, values)  # q, k, v
        self.in_widths = (2 * keys + values, gate_rank or values, decay_rank or decays, num_heads)  # …, gate, f, b
        new: dict[str, Any] = {"std": std, "rngs": rngs}
        self.in_proj = Linear(hidden_size, sum(self.in_widths), **new)
        self.gate_proj = Linear(gate_rank, values, bias=gate_bias, **new) if gate_rank else None
        self.decay_proj = Linear(decay_rank, decays, **new) if decay_rank else None
        self.conv = ShortConvolution(2 * keys + values, conv_width, conv_bias, rngs)
        self.dt_bias = nnx.Param(initial_dt_bias(decays, rngs))
        rates = jax.random.uniform(rngs.params(), (num_heads,), jnp.float32, 1.0, 16.0)
        self.A_log = nnx.Param(jnp.log(rates) if decay_bound is None else jnp.zeros_like(rates))
        start = (num_levels, level_scale_start, rngs)
        self.level_scale = LevelScale(hidden_size, num_heads, *start) if log_linear else None
        self.norm = RMSNorm(value_dim, norm_eps)
        self.out_proj = Linear(values, hidden_size, **new)

    def sizes(self) -> tuple[int, int, int, int]:
        return self.num_key_heads, self.widths[0], self.num_heads, self.widths[1]

    def project(self, hidden: Array) -> list[Array]:
        qkv, gate, f, b = super().project(hidden)
        gate = gate if self.gate_proj is None else self.gate_proj(gate)
        return [qkv, gate, f if self.decay_proj is None else self.decay_proj(f), b]

    def inputs(
        self, mixed: Array, parts: list[Array], position: Array
    ) -> tuple[Array, Array, Array, Array, Array | None]:
        q, k, v = jnp.split(mixed, ends(self.conv_widths), -1)
        q, k = (unit(split_heads(x, self.num_key_heads), "q") for x in (q, k))
        f = split_heads(wide(parts[2]) + wide(self.dt_bias[...]), self.num_heads)
        rate = jnp.exp(wide(self.A_log[...]))[:, None]
        if self.decay_bound is None:
            g = -rate * jax.nn.softplus(f)
        else:
            g = self.decay_bound * jax.nn.sigmoid(rate * f)
        beta = jax.nn.sigmoid(wide(parts[3]))
        return q, k, split_heads(v, self.num_heads), g, 2 * beta if self.neg_eigval else beta

    def outputs(self, o: Array, mixed: Array, parts: list[Array]) -> Array:
        opened = wide(self.norm(wide(o))) * jax.nn.sigmoid(wide(split_heads(parts[1], self.num_heads)))
        return self.out_proj(opened.astype(mixed.dtype).reshape(*o.shape[:2], -1))
