"""LAYERS in Flax NNX: what all mixers share, the Log-Linear Mamba-2 and Log-Linear Gated DeltaNet mixers, and with
``log_linear=False`` their linear twins. ``linear_attention.py`` and ``kda.py`` have the other mixers.

Parameters have the names and shapes of the PyTorch layers' (a linear weight is ``[out, in]``), so that a checkpoint is
a dictionary of arrays in both. Decays, norms and λ are computed in float32 at least. Source of the blocks: Dao & Gu
2024, section 7; Yang et al. 2024;
of the levels: Guo et al. 2025, section 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from loglinear.jax.ops import attend, unit
from loglinear.jax.state import LinearState, LogLinearState, empty_state
from loglinear.jax.step import log_linear_attention_step, log_linear_delta_rule_step

OFFSETS = {
    "paper": 0.0,
    "one": math.log(math.e - 1),
}  # where λ starts at a projection of 0: ln 2, or 1, the linear model
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "elu": lambda x: jax.nn.elu(x) + 1,
    "identity": lambda x: x,
}


def activation(name: str, argument: str) -> Callable[[Array], Array]:
    """The activation of this name. Raises ValueError, which names ``argument``, for an unknown one."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{argument} must be one of {list(ACTIVATIONS)}: got {name!r}")
    return ACTIVATIONS[name]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MixerState:
    """The past of a mixer: the state of its op, and the last inputs of its convolution, ``[B, W - 1, channels]``.

    memory: of softmax attention, which has no convolution, a ``loglinear.jax.attention.KVState``.
    """

    memory: Any
    conv_tail: Array


class Documents(NamedTuple):
    """Packed documents: ids ``[B, T]``, and the most of them in all rows (``max_segments`` of the ops)."""

    ids: Array
    most: int | None = None

    def numbers(self) -> Array:
        """``[B, T]``, which document of its row a token is in."""
        return jnp.cumsum(jnp.pad(self.ids[:, 1:] != self.ids[:, :-1], ((0, 0), (1, 0))), 1)


class Past(NamedTuple):
    """The past of a call, and the past that it leaves.

    state: of an earlier call, or None. output: whether to return the state after the last token. lengths: ``[B]``, tokens
    of each row, with padding behind them; None is all. documents: packed documents, which have no state.
    """

    state: MixerState | None = None
    output: bool = False
    lengths: Array | None = None
    documents: Documents | None = None


def wide(x: Array) -> Array:
    """x in float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Linear(nnx.Module):
    """``x @ weight.T + bias``, weight ``[outputs, inputs]``."""

    def __init__(self, inputs: int, outputs: int, *, std: float, rngs: nnx.Rngs, bias: bool = False) -> None:
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (outputs, inputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None

    def __call__(self, x: Array) -> Array:
        y = jnp.einsum("...i,oi->...o", x, self.weight[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x²) + eps) · weight`` over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        self.weight, self.eps = nnx.Param(jnp.ones(width, jnp.float32)), eps

    def __call__(self, x: Array) -> Array:
        y = wide(x)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.weight[...].astype(y.dtype)).astype(x.dtype)


class ShortConvolution(nnx.Module):
    """``y_t = act(bias + Σ_i weight[:, i] · x_{t-W+1+i})`` for each channel; nothing crosses the start of a document.

    width: W, taps; 0 leaves the activation alone.
    """

    def __init__(self, channels: int, width: int, bias: bool, rngs: nnx.Rngs, act: str = "silu") -> None:
        if width < 0:
            raise ValueError(f"conv_width must be at least 0: got {width}")
        bound = 1 / math.sqrt(max(width, 1))
        shape = (channels, width)
        start = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound) if width else None
        self.weight = None if start is None else nnx.Param(start)
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32)) if bias and width else None
        self.tail_shape, self.act = (max(width - 1, 0), channels), activation(act, "conv_activation")

    def __call__(self, x: Array, past: Past) -> tuple[Array, Array]:
        """x ``[B, T, channels]`` convolved, and its tail ``[B, W - 1, channels]``."""
        (keep, _), (rows, length, _) = self.tail_shape, x.shape
        tail = (
            jnp.zeros((rows, *self.tail_shape), x.dtype) if past.state is None else past.state.conv_tail.astype(x.dtype)
        )
        extended = jnp.concatenate([tail, x], 1)
        last = jnp.full(rows, length) if past.lengths is None else past.lengths
        tail = jnp.take_along_axis(extended, (last[:, None] + jnp.arange(keep))[..., None], 1)
        if self.weight is None:
            return self.act(x), tail
        taps = [extended[:, i : i + length] for i in range(keep + 1)]
        if past.documents is not None:
            number = jnp.pad(past.documents.numbers(), ((0, 0), (keep, 0)), constant_values=-1)
            same = [number[:, i : i + length] == number[:, keep:] for i in range(keep + 1)]
            taps = [jnp.where(there[..., None], tap, 0) for there, tap in zip(same, taps)]
        weight = self.weight[...].astype(x.dtype)
        y: Array = sum(tap * weight[:, i] for i, tap in enumerate(taps))  # type: ignore[assignment]
        return self.act(y if self.bias is None else y + self.bias[...].astype(x.dtype)), tail


class LevelScale(nnx.Module):
    """``λ = softplus(L ∘ dl + c)``, ``[B, T, H, levels]``: L a parameter for each head and level, dl a projection of
    the input.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_levels: int, start: str, rngs: nnx.Rngs) -> None:
        if start not in OFFSETS:
            raise ValueError(f"start must be one of {list(OFFSETS)}: got {start!r}")
        self.L = nnx.Param(jnp.ones((num_heads, num_levels), jnp.float32))
        self.dl_proj = Linear(hidden_size, num_heads * num_levels, std=0.006, rngs=rngs)
        self.offset = OFFSETS[start]

    def __call__(self, hidden: Array) -> Array:
        dl = self.dl_proj(hidden)
        dl = dl.reshape(*dl.shape[:-1], *self.L.shape)
        return jax.nn.softplus(wide(self.L[...]) * wide(dl) + self.offset).astype(hidden.dtype)


def initial_dt_bias(heads: int, rngs: nnx.Rngs) -> Array:
    """Biases b with softplus(b) log-uniform in [1e-3, 1e-1]."""
    step = jnp.exp(jax.random.uniform(rngs.params(), (heads,), jnp.float32, math.log(1e-3), math.log(1e-1)))
    return step + jnp.log(-jnp.expm1(-step))


class Mixer(nnx.Module):
    """Base: projections, convolution, gates, the op or its step, norm and output. A kind adds ``inputs`` and
    ``outputs``.
    """

    conv: ShortConvolution
    in_proj: Linear
    level_scale: LevelScale | None
    in_widths: tuple[int, ...]
    conv_part = 0  # which of the projections is convolved
    delta_rule = per_channel = False  # the op, and the kind of its gate

    def project(self, hidden: Array) -> list[Array]:
        """The projections of hidden ``[B, T, hidden_size]``."""
        return list(jnp.split(self.in_proj(hidden), ends(self.in_widths), -1))

    def inputs(
        self, mixed: Array, parts: list[Array], position: Array
    ) -> tuple[Array, Array, Array, Array, Array | None]:
        """q, k, v, g, beta from the convolved channels and the other projections; position ``[B, T]``."""
        raise NotImplementedError

    def outputs(self, o: Array, mixed: Array, parts: list[Array]) -> Array:
        """``[B, T, hidden_size]``."""
        raise NotImplementedError

    def __call__(self, hidden: Array, past: Past = Past()) -> tuple[Array, MixerState | None]:  # noqa: B008
        """Mix hidden ``[B, T, hidden_size]`` along T. One token with a state is a step."""
        parts = self.project(hidden)
        mixed, tail = self.conv(parts[self.conv_part], past)
        q, k, v, g, beta = self.inputs(mixed, parts, positions(hidden, past))
        scales = None if self.level_scale is None else self.level_scale(hidden)
        memory = None if past.state is None else past.state.memory
        if isinstance(memory, LogLinearState) and hidden.shape[1] == 1 and past.lengths is None:
            if beta is None:
                o, memory = log_linear_attention_step(q, k, v, g, scales, memory)
            else:
                o, memory = log_linear_delta_rule_step(q, k, v, g, beta, scales, memory)
        else:
            ids, most = past.documents or (None, None)
            inputs = (q, k, v, g, beta, scales, None, memory, past.output)
            o, memory = attend(*inputs, segment_ids=ids, max_segments=most, lengths=past.lengths)
        out = self.outputs(o, mixed, parts)
        return out, MixerState(memory, tail) if past.output and memory is not None else None

    def empty_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> MixerState:
        """The state before the first token, with slots for ``max_length``."""
        groups, key_dim, heads, value_dim = self.sizes()
        tail = jnp.zeros((batch, *self.conv.tail_shape), dtype)
        if self.level_scale is None:
            state = jnp.zeros((batch, heads, key_dim, value_dim), jnp.promote_types(dtype, jnp.float32))
            return MixerState(LinearState(jnp.zeros(batch, jnp.int32), state), tail)
        kind = {"delta_rule": self.delta_rule, "per_channel": self.per_channel}
        return MixerState(empty_state(batch, groups, heads, key_dim, value_dim, max_length, dtype=dtype, **kind), tail)

    def sizes(self) -> tuple[int, int, int, int]:
        """G, K, H, V."""
        raise NotImplementedError


def positions(hidden: Array, past: Past) -> Array:
    """int32 ``[B, T]``: tokens of its own sequence before each token."""
    rows, length = hidden.shape[:2]
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    if past.documents is not None:
        number = past.documents.numbers()
        new = jnp.pad(number[:, 1:] != number[:, :-1], ((0, 0), (1, 0)))
        return position - jax.lax.cummax(jnp.where(new, position, 0), 1)
    return position if past.state is None else position + past.state.memory.position[:, None]


def rotary(x: Array, position: Array, base: float) -> Array:
    """x ``[B, T, heads, W]``, pairs ``(i, i + W/2)`` turned by ``position [B, T] · base^(-2i/W)`` (Su et al. 2021)."""
    half = x.shape[-1] // 2
    angle = position[..., None, None] * base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    (left, right), (cos, sin) = jnp.split(wide(x), 2, -1), (jnp.cos(angle), jnp.sin(angle))
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)


def ends(widths: tuple[int, ...]) -> list[int]:
    """Where each part but the last ends."""
    return [sum(widths[: i + 1]) for i in range(len(widths) - 1)]


def split_heads(x: Array, heads: int) -> Array:
    """``[…, heads · width]`` to ``[…, heads, width]``."""
    return x.reshape(*x.shape[:-1], heads, -1)


class LogLinearMamba2(Mixer):
    """Log-Linear Mamba-2. Arguments as of ``loglinear.layers.LogLinearMamba2``; std: of the projections at the start."""

    conv_part = 1

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int = 64,
        state_size: int = 128,
        num_groups: int = 1,
        num_levels: int = 15,
        conv_width: int = 4,
        norm_eps: float = 1e-6,
        log_linear: bool = True,
        level_scale_start: str = "paper",
        *,
        rngs: nnx.Rngs,
        std: float = 0.02,
    ) -> None:
        if min(num_heads, num_groups) < 1 or num_heads % num_groups:
            raise ValueError(f"num_heads must be a positive multiple of num_groups={num_groups}: got {num_heads}")
        inner, keys = num_heads * head_dim, num_groups * state_size
        self.num_heads, self.num_groups = num_heads, num_groups
        self.conv_widths = (inner, keys, keys)  # x, B, C
        self.in_widths = (inner, inner + 2 * keys, num_heads)  # z, (x, B, C), dt
        self.in_proj = Linear(hidden_size, sum(self.in_widths), std=std, rngs=rngs)
        self.conv = ShortConvolution(inner + 2 * keys, conv_width, True, rngs)
        self.dt_bias = nnx.Param(initial_dt_bias(num_heads, rngs))
        self.A_log = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (num_heads,), jnp.float32, 1.0, 16.0)))
        self.D = nnx.Param(jnp.ones(num_heads, jnp.float32))
        start = (num_levels, level_scale_start, rngs)
        self.level_scale = LevelScale(hidden_size, num_heads, *start) if log_linear else None
        self.norm = RMSNorm(inner, norm_eps)
        self.out_proj = Linear(inner, hidden_size, std=std, rngs=rngs)

    def sizes(self) -> tuple[int, int, int, int]:
        inner, keys, _ = self.conv_widths
        return self.num_groups, keys // self.num_groups, self.num_heads, inner // self.num_heads

    def inputs(
        self, mixed: Array, parts: list[Array], position: Array
    ) -> tuple[Array, Array, Array, Array, Array | None]:
        x, B, C = jnp.split(mixed, ends(self.conv_widths), -1)
        dt = jax.nn.softplus(wide(parts[2]) + wide(self.dt_bias[...]))
        v = (split_heads(x, self.num_heads) * dt[..., None]).astype(x.dtype)
        return (
            split_heads(C, self.num_groups),
            split_heads(B, self.num_groups),
            v,
            -jnp.exp(wide(self.A_log[...])) * dt,
            None,
        )

    def outputs(self, o: Array, mixed: Array, parts: list[Array]) -> Array:
        x = split_heads(mixed[..., : self.conv_widths[0]], self.num_heads)
        y = (o + x * self.D[...].astype(x.dtype)[:, None]).reshape(*o.shape[:2], -1)
        gated = wide(y) * jax.nn.silu(wide(parts[0]))
        return self.out_proj(self.norm(gated).astype(mixed.dtype))


class LogLinearGatedDeltaNet(Mixer):
    """Log-Linear Gated DeltaNet. Arguments as of ``loglinear.layers.LogLinearGatedDeltaNet``; std: of the projections
    at the start.
    """

    delta_rule = True

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
        rngs: nnx.Rngs,
        std: float = 0.02,
    ) -> None:
        num_key_heads = num_heads if num_key_heads is None else num_key_heads
        if min(num_heads, num_key_heads) < 1 or num_heads % num_key_heads:
            raise ValueError(f"num_heads must be a positive multiple of num_key_heads={num_key_heads}: got {num_heads}")
        self.num_heads, self.num_key_heads = num_heads, num_key_heads
        keys, values = num_key_heads * key_dim, num_heads * value_dim
        self.conv_widths = (keys, keys, values)  # q, k, v
        self.in_widths = (2 * keys + values, values, num_heads, num_heads)  # (q, k, v), gate, a, b
        self.in_proj = Linear(hidden_size, sum(self.in_widths), std=std, rngs=rngs)
        self.conv = ShortConvolution(2 * keys + values, conv_width, False, rngs)
        self.dt_bias = nnx.Param(initial_dt_bias(num_heads, rngs))
        self.A_log = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (num_heads,), jnp.float32, 1e-2, 16.0)))
        start = (num_levels, level_scale_start, rngs)
        self.level_scale = LevelScale(hidden_size, num_heads, *start) if log_linear else None
        self.norm = RMSNorm(value_dim, norm_eps)
        self.out_proj = Linear(values, hidden_size, std=std, rngs=rngs)

    def sizes(self) -> tuple[int, int, int, int]:
        keys, _, values = self.conv_widths
        return self.num_key_heads, keys // self.num_key_heads, self.num_heads, values // self.num_heads

    def inputs(
        self, mixed: Array, parts: list[Array], position: Array
    ) -> tuple[Array, Array, Array, Array, Array | None]:
        q, k, v = jnp.split(mixed, ends(self.conv_widths), -1)
        q, k = (unit(split_heads(x, self.num_key_heads), "q") for x in (q, k))
        g = -jnp.exp(wide(self.A_log[...])) * jax.nn.softplus(wide(parts[2]) + wide(self.dt_bias[...]))
        return q, k, split_heads(v, self.num_heads), g, jax.nn.sigmoid(wide(parts[3]))

    def outputs(self, o: Array, mixed: Array, parts: list[Array]) -> Array:
        opened = wide(self.norm(wide(o))) * jax.nn.silu(wide(split_heads(parts[1], self.num_heads)))
        return self.out_proj(opened.astype(mixed.dtype).reshape(*o.shape[:2], -1))
