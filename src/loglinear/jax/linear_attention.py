"""LINEAR ATTENTION in Flax NNX: the mixers whose states decay and are never corrected, log-linear and linear.

``LogLinearGLA`` has a decay for each key channel. ``LogLinearRetention`` has a constant for each head: RetNet, and MiniMax's
lightning attention.
"""

from __future__ import annotations

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
    activation,
    ends,
    rotary,
    split_heads,
    wide,
)


class LinearAttention(Mixer):
    """Base of both. Arguments as of ``loglinear.layers.linear_attention.LinearAttention``."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        num_kv_heads: int | None = None,
        num_levels: int = 15,
        conv_width: int = 0,
        norm_eps: float = 1e-6,
        log_linear: bool = True,
        level_scale_start: str = "paper",
        *,
        conv_bias: bool = False,
        conv_activation: str | None = None,
        qk_activation: str = "identity",
        gate_activation: str | None = "silu",
        norm_per_head: bool = True,
        decay_rank: int = 0,
        rngs: nnx.Rngs,
        std: float = 0.02,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(num_heads, num_kv_heads) < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a positive multiple of num_kv_heads={num_kv_heads}: got {num_heads}")
        self.num_heads, self.num_kv_heads, self.widths = num_heads, num_kv_heads, (key_dim, value_dim)
        self.norm_per_head, self.act = norm_per_head, activation(qk_activation, "qk_activation")
        self.gate_act = None if gate_activation is None else activation(gate_activation, "gate_activation")
        self.conv_widths = (num_heads * key_dim, num_kv_heads * key_dim, num_kv_heads * value_dim)  # q, k, v
        values = num_heads * value_dim
        self.in_widths = (sum(self.conv_widths), 0 if gate_activation is None else values, decay_rank)
        self.in_proj = Linear(hidden_size, sum(self.in_widths), std=std, rngs=rngs)
        decays = (decay_rank, num_kv_heads * key_dim)
        self.decay_proj = Linear(*decays, std=std, rngs=rngs, bias=True) if decay_rank else None
        act = conv_activation or ("silu" if conv_width else "identity")
        self.conv = ShortConvolution(sum(self.conv_widths), conv_width, conv_bias, rngs, act)
        start = (num_levels, level_scale_start, rngs)
        self.level_scale = LevelScale(hidden_size, num_heads, *start) if log_linear else None
        self.norm = RMSNorm(value_dim if norm_per_head else values, norm_eps)
        self.out_proj = Linear(values, hidden_size, std=std, rngs=rngs)

    def sizes(self) -> tuple[int, int, int, int]:
        return self.num_heads, self.widths[0], self.num_heads, self.widths[1]

    def decay(self, rate: Array) -> Array:
        """g ``[B, T, H]``, or ``[B, T, num_kv_heads, K]`` for each key channel."""
        raise NotImplementedError

    def place(self, x: Array, position: Array) -> Array:
        """q or k ``[B, T, heads, K]`` with what their positions do to them."""
        return x

    def inputs(
        self, mixed: Array, parts: list[Array], position: Array
    ) -> tuple[Array, Array, Array, Array, Array | None]:
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = map(split_heads, jnp.split(mixed, ends(self.conv_widths), -1), heads)
        q, k = (self.place(self.act(x), position) for x in (q, k))
        each = lambda x: x if x.shape[2] == self.num_heads else jnp.repeat(x, self.num_heads // x.shape[2], axis=2)  # noqa: E731
        return q, each(k), each(v), each(self.decay(parts[2])), None

    def outputs(self, o: Array, mixed: Array, parts: list[Array]) -> Array:
        gate = split_heads(parts[1], self.num_heads) if self.norm_per_head else parts[1]
        o = self.norm(wide(o if self.norm_per_head else o.reshape(*o.shape[:2], -1)))
        opened = o if self.gate_act is None else o * self.gate_act(wide(gate))
        return self.out_proj(opened.astype(mixed.dtype).reshape(*o.shape[:2], -1))


class LogLinearGLA(LinearAttention):
    """Log-Linear GLA: ``g = logsigmoid(decay_proj(x)) / decay_normalizer``. Arguments as of
    ``loglinear.layers.LogLinearGLA``; std: of the projections at the start.

    Source: Yang et al. 2024 (Gated Linear Attention), section 4; Guo et al. 2025, section 3.4 (levels).
    """

    per_channel = True

    def __init__(
        self,
        *sizes: int,
        decay_rank: int = 16,
        decay_normalizer: float = 16.0,
        decay_min: float | None = None,
        rngs: nnx.Rngs,
        **options: object,
    ) -> None:
        if decay_rank < 1:
            raise ValueError(f"decay_rank must be at least 1: got {decay_rank}")
        if decay_normalizer <= 0:
            raise ValueError(f"decay_normalizer must be positive: got {decay_normalizer}")
        super().__init__(*sizes, decay_rank=decay_rank, rngs=rngs, **options)  # type: ignore[arg-type]
        self.decay_normalizer, self.decay_min = decay_normalizer, decay_min

    def project(self, hidden: Array) -> list[Array]:
        qkv, gate, rate = super().project(hidden)
        assert self.decay_proj is not None
        return [qkv, gate, self.decay_proj(rate)]

    def decay(self, rate: Array) -> Array:
        g = jax.nn.log_sigmoid(wide(rate)) / self.decay_normalizer
        return split_heads(g if self.decay_min is None else jnp.maximum(g, self.decay_min), self.num_kv_heads)


class LogLinearRetention(LinearAttention):
    """Log-Linear retention. Arguments as of ``loglinear.layers.LogLinearRetention``; std: of the projections at the start.

    Source: Sun et al. 2023 (RetNet); Qin et al. 2024 (Lightning Attention-2); Guo et al. 2025, section 3.4 (levels).
    """

    def __init__(
        self,
        *sizes: int,
        decays: str = "retention",
        decay_factor: float = 1.0,
        rotary_base: float | None = 10_000.0,
        rngs: nnx.Rngs,
        **options: object,
    ) -> None:
        if decays not in ("retention", "slopes"):
            raise ValueError(f"decays must be 'retention' or 'slopes': got {decays!r}")
        super().__init__(*sizes, rngs=rngs, **options)  # type: ignore[arg-type]
        if rotary_base is not None and self.widths[0] % 2:
            raise ValueError(f"key_dim must be even (rotary positions turn pairs): got {self.widths[0]}")
        self.decays, self.decay_factor, self.rotary_base = decays, decay_factor, rotary_base

    def decay(self, rate: Array) -> Array:
        head = jnp.arange(self.num_heads, dtype=jnp.float32)
        slopes = -jnp.exp2((head + 1) * (-8.0 / self.num_heads))
        logs = jnp.log1p(-jnp.exp2(-5.0 - head)) if self.decays == "retention" else slopes
        return jnp.broadcast_to(self.decay_factor * logs, (*rate.shape[:2], self.num_heads))

    def place(self, x: Array, position: Array) -> Array:
        """x turned by its position, where there are rotary positions."""
        return x if self.rotary_base is None else rotary(x, position, self.rotary_base)
