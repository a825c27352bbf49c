"""LogLinearMamba2: the Mamba-2 block whose scan reads O(log T) states; with ``log_linear=False`` it is Mamba-2.

In attention's terms C is the query, B the key and ``x · dt`` the value. One call of ``log_linear_attention`` is the whole
sequence mixing. The two models differ by ``level_scale`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.layers import step
from loglinear.layers.conv import ShortConvolution
from loglinear.layers.initialization import initial_A_log, initial_dt_bias, wide
from loglinear.layers.level_scale import LevelScale, Start
from loglinear.layers.linear import Normed, beside, joins
from loglinear.layers.mixer import RecurrentMixer, Streams
from loglinear.layers.norm import GatedRMSNorm, OutputGate
from loglinear.layers.packing import check_packed, locate_tokens
from loglinear.layers.state import RecurrentMixerState
from loglinear.ops import checks, convolution, dispatch, mixing, pointwise
from loglinear.ops.attention import keep
from loglinear.ops.fused import Columns
from loglinear.ops.inputs import Inputs

NO_LIMIT = (0.0, math.inf)  # of a time step, which is positive


class LogLinearMamba2(RecurrentMixer):
    """Log-Linear Mamba-2 mixer.

    Args:
        hidden_size: width of input and output.
        num_heads: H, value heads. head_dim: V, width of each. The inner width is H·V (Mamba-2 takes twice hidden_size).
        state_size: K, width of B and C. num_groups: G, heads of B and C; H is a multiple of G.
        num_levels: levels with a λ of their own; ``num_levels(longest context)`` gives every level one.
        conv_width: taps of the short convolution over (x, B, C). norm_eps: of the gated norm.
        log_linear: whether to read the buckets of every level; False is the linear model.
        level_scale_start: where λ starts; see ``LevelScale``.
        use_bias, conv_bias: of both projections, and of the convolution. conv_activation: behind it.
        norm: whether the output is normalised; False leaves the gate alone. norm_groups: equal parts of the inner width,
            each normalised by itself. norm_before_gate: whether the norm comes before the gate.
        skip_per_channel: whether D has a number for each channel of x, not one for each head. level_scale_bias: of λ's
            projection.
        dt_limit: least and greatest time step, to which a step is clamped after its softplus; None: no limits.
        in_multiplier: of the input of ``in_proj``. in_multipliers: of its outputs z, x, B, C and dt; None is 1.

    The fields from use_bias on are what published Mamba-2 models differ in. On CUDA the fields of the norm, conv_activation
    and dt_limit run in plain PyTorch where they are not the defaults.

    Source: Dao & Gu 2024, section 7 (block); Guo et al. 2025, section 3.4 (levels).
    """

    no_weight_decay = frozenset({"A_log", "dt_bias", "D"})
    in_scale: Tensor | None

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
        level_scale_start: Start = "paper",
        *,
        use_bias: bool = False,
        conv_bias: bool = True,
        conv_activation: str = "silu",
        norm: bool = True,
        norm_groups: int = 1,
        norm_before_gate: bool = False,
        dt_limit: Sequence[float] | None = None,
        skip_per_channel: bool = False,
        level_scale_bias: bool = False,
        in_multiplier: float = 1.0,
        in_multipliers: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if min(num_heads, num_groups) < 1 or num_heads % num_groups:
            raise ValueError(f"num_heads must be a positive multiple of num_groups={num_groups}: got {num_heads}")
        dt_limit = NO_LIMIT if dt_limit is None else dt_limit
        if len(dt_limit) != 2 or not 0 <= dt_limit[0] <= dt_limit[1]:
            raise ValueError(
                f"dt_limit must be a least and a greatest time step, 0 <= least <= greatest: got {dt_limit}"
            )
        self.num_heads, self.num_groups = num_heads, num_groups
        self.dt_limit, self.in_multiplier = (float(dt_limit[0]), float(dt_limit[1])), in_multiplier
        inner, keys = num_heads * head_dim, num_groups * state_size
        self.conv_widths = [inner, keys, keys]  # x, B, C
        self.in_widths = [inner, sum(self.conv_widths), num_heads]  # z, (x, B, C), dt
        self.in_proj = nn.Linear(hidden_size, sum(self.in_widths), bias=use_bias)
        self.register_buffer("in_scale", self._in_scale(in_multipliers), persistent=False)
        self.conv = ShortConvolution(sum(self.conv_widths), conv_width, conv_bias, conv_activation)
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.D = nn.Parameter(torch.empty(inner if skip_per_channel else num_heads))
        levels = (num_levels, level_scale_start, level_scale_bias)
        self.level_scale = LevelScale(hidden_size, num_heads, *levels) if log_linear else None
        self.norm = GatedRMSNorm(inner, norm_eps, not norm_before_gate, norm_groups) if norm else OutputGate()
        self.out_proj = nn.Linear(inner, hidden_size, bias=use_bias)
        self.reset_parameters()

    def _in_scale(self, multipliers: Sequence[float] | None) -> Tensor | None:
        """The five factors, each for its columns."""
        if multipliers is None:
            return None
        if len(multipliers) != 5:
            raise ValueError(f"in_multipliers must have five factors, of z, x, B, C and dt: got {list(multipliers)}")
        widths = torch.tensor([self.in_widths[0], *self.conv_widths, self.num_heads])
        return torch.tensor(list(multipliers), dtype=torch.get_default_dtype()).repeat_interleave(widths)

    def initial_values(self) -> dict[str, Tensor]:
        """Time steps log-uniform in [1e-3, 1e-1], rates A uniform in [1, 16], a skip of 1 (Dao & Gu 2024)."""
        heads, device = self.num_heads, self.D.device
        return {
            "dt_bias": initial_dt_bias(heads, device),
            "A_log": initial_A_log(heads, device, 1.0, 16.0),
            "D": torch.ones_like(self.D),
        }

    def project(self, hidden: Tensor) -> Streams:
        scaled = None if self.in_multiplier == 1 else hidden * self.in_multiplier
        joined, dl = self.joint(hidden, scaled)
        column_scale = self.column_scale()
        if column_scale is not None:
            joined = joined * column_scale.to(joined.dtype)
        z, xBC, dt = joined.split(self.in_widths, dim=-1)
        return Streams(conv=xBC, gate=z, rate=dt, dl=dl, joined=joined)

    def column_scale(self) -> Tensor | None:
        """``[columns]``, the factor of each column of the input projection; None where all are 1."""
        return self.in_scale

    def inputs(self, mixed: Tensor, streams: Streams) -> tuple[dict[str, Tensor], Tensor | None]:
        x, B, C = mixed.split(self.conv_widths, dim=-1)
        v, g, x = self._discretise(x.unflatten(-1, (self.num_heads, -1)), streams.rate)
        inputs = {
            "q": C.unflatten(-1, (self.num_groups, -1)),
            "k": B.unflatten(-1, (self.num_groups, -1)),
            "v": v,
            "g": g,
        }
        return inputs, x  # the skip takes x as it is, not x·dt

    def outputs(self, o: Tensor, gate: Tensor, skip: Tensor | None) -> Tensor:
        assert skip is not None
        return self.out_proj(self.norm(o.flatten(-2), gate, skip.flatten(-2), self.D))

    def unfused(self) -> str | None:
        if self.D.shape[0] != self.num_heads:
            return "a skip per channel"
        return super().unfused() or (None if self.dt_limit == NO_LIMIT else "a dt_limit")

    def _discretise(self, x: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """v = x·dt and x ``[B, T, H, V]``, and g ``[B, T, H]``, after the softplus of dt ``[B, T, H]``."""
        if pointwise.has_kernels(x, dt, self.dt_bias, self.A_log):
            if self.dt_limit == NO_LIMIT:
                return pointwise.discretise(x, dt, self.dt_bias, self.A_log)
            dispatch.plain("a time step", "a dt_limit")
        dt = F.softplus(wide(dt) + wide(self.dt_bias))
        if self.dt_limit != NO_LIMIT:
            dt = dt.clamp(*self.dt_limit)
        return (x * dt.unsqueeze(-1)).to(x.dtype), -torch.exp(wide(self.A_log)) * dt, x

    def whole(self, hidden: Tensor, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None) -> Tensor | None:
        levels = self.level_scale
        if levels is None or not joins(hidden, self.in_proj, levels.dl_proj) or not self._mixes_whole(hidden):
            return None
        assert isinstance(self.norm, GatedRMSNorm)
        place = None
        if cu_seqlens is not None:
            check_packed(hidden, "hidden", cu_seqlens)
            if cu_seqlens_cpu is not None:
                checks.sequence_lengths(hidden, cu_seqlens, cu_seqlens_cpu)
            place = locate_tokens(cu_seqlens, hidden.shape[1])[1].int()
        both, start = beside(hidden, self.in_proj, levels.dl_proj)
        weights = self.conv.taps, self.conv.bias, self.dt_bias, self.A_log, self.D, levels.L, self.norm.weight
        sizes = self.num_groups, start, levels.offset, self.norm.eps, self.norm.gate_first
        kept = keep(Inputs(both, both, both, None, None, levels.L), cu_seqlens)
        return mixing.mamba2(both, *weights, cu_seqlens, place, *sizes, kept)

    def _mixes_whole(self, hidden: Tensor) -> bool:
        """Whether the kernels take every line between the projections of hidden ``[B, T, hidden_size]``."""
        if self.unfused() or self.in_multiplier != 1 or self.column_scale() is not None:
            return False
        given = [self.dt_bias, self.A_log, self.D, self.norm.get_parameter("weight"), self.conv.bias]
        if not pointwise.has_kernels(hidden, *given) or not convolution.has_kernel(hidden, self.conv.taps):
            return False
        v, k = hidden.new_empty(()), hidden.new_empty(())
        v = v.expand(*hidden.shape[:2], self.num_heads, self.conv_widths[0] // self.num_heads)
        k = k.expand(*hidden.shape[:2], self.num_groups, self.conv_widths[1] // self.num_groups)
        return self.conv_widths[0] <= pointwise.MAX_WIDTH and dispatch.attention(Inputs(k, k, v, None, None, None))

    def fused_step(self, streams: Streams, state: RecurrentMixerState) -> Tensor:
        inputs, x = self._step_inputs(streams, state)
        return step.gate_and_norm(self, step.recur(*inputs, state), streams.gate, state, skip=(x, self.D))

    def token_step(self, streams: Streams, state: RecurrentMixerState) -> Tensor | Normed:
        if not step.gates_too(self, state):
            return self.fused_step(streams, state)
        assert isinstance(self.norm, GatedRMSNorm)
        inputs, x = self._step_inputs(streams, state)
        return Normed(step.recur_and_gate(*inputs, state, (x, self.D, streams.gate)), self.norm)

    def _step_inputs(
        self, streams: Streams, state: RecurrentMixerState
    ) -> tuple[tuple[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]:
        """q, k, v and the gates of a step; and x ``[B, T, H·V]``."""
        inner, channels, _ = self.in_widths
        columns = Columns(conv=inner, rate=inner + channels, scaled=inner)
        mixed, v, gates = step.convolve_and_gate(self, streams, state, columns)
        assert v is not None
        x, B, C = mixed.split(self.conv_widths, dim=-1)
        q, k = (y.unflatten(-1, (self.num_groups, -1)) for y in (C, B))
        return (q, k, v.unflatten(-1, (self.num_heads, -1)), gates), x
