"""LogLinearMamba2: the Mamba-2 block whose scan reads O(log T) states; with ``log_linear=False`` it is Mamba-2.

In attention's terms C is the query, B the key and ``x · dt`` the value. One call of ``log_linear_attention`` is the whole
sequence mixing. The two models differ by ``level_scale`` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.layers import step
from loglinear.layers.conv import ShortConvolution
from loglinear.layers.initialization import StatedInit, initial_A_log, initial_dt_bias, wide
from loglinear.layers.level_scale import LevelScale, Start
from loglinear.layers.linear import projections
from loglinear.layers.norm import GatedRMSNorm
from loglinear.layers.recurrence import convolve, mix
from loglinear.layers.state import RecurrentMixerState
from loglinear.ops import pointwise
from loglinear.ops.fused import Columns

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


class LogLinearMamba2(StatedInit):
    """Log-Linear Mamba-2 mixer.

    Args:
        hidden_size: width of input and output.
        num_heads: H, value heads. head_dim: V, width of each. The inner width is H·V (Mamba-2 takes twice hidden_size).
        state_size: K, width of B and C. num_groups: G, heads of B and C; H is a multiple of G.
        num_levels: levels with a λ of their own; ``num_levels(longest context)`` gives every level one.
        conv_width: taps of the short convolution over (x, B, C). norm_eps: of the gated norm.
        log_linear: whether to read the buckets of every level; False is the linear model.
        level_scale_start: where λ starts; see ``LevelScale``.

    Source: Dao & Gu 2024, section 7 (block); Guo et al. 2025, section 3.4 (levels).
    """

    no_weight_decay = frozenset({"A_log", "dt_bias", "D"})

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
    ) -> None:
        super().__init__()
        if min(num_heads, num_groups) < 1 or num_heads % num_groups:
            raise ValueError(f"num_heads must be a positive multiple of num_groups={num_groups}: got {num_heads}")
        self.num_heads, self.num_groups = num_heads, num_groups
        inner, keys = num_heads * head_dim, num_groups * state_size
        self.conv_widths = [inner, keys, keys]  # x, B, C
        self.in_widths = [inner, sum(self.conv_widths), num_heads]  # z, (x, B, C), dt
        self.in_proj = nn.Linear(hidden_size, sum(self.in_widths), bias=False)
        self.conv = ShortConvolution(sum(self.conv_widths), conv_width)
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.D = nn.Parameter(torch.empty(num_heads))
        self.level_scale = LevelScale(hidden_size, num_heads, num_levels, level_scale_start) if log_linear else None
        self.norm = GatedRMSNorm(inner, norm_eps, gate_first=True)
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)
        self.context_group: ProcessGroup | None = None  # set_context_group
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """Time steps log-uniform in [1e-3, 1e-1], rates A uniform in [1, 16], a skip of 1 (Dao & Gu 2024)."""
        heads, device = self.num_heads, self.D.device
        return {
            "dt_bias": initial_dt_bias(heads, device),
            "A_log": initial_A_log(heads, device, 1.0, 16.0),
            "D": torch.ones(heads, device=device),
        }

    def forward(
        self,
        hidden: Tensor,
        state: RecurrentMixerState | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> tuple[Tensor, RecurrentMixerState | None]:
        """Mix along T. Arguments and results are those of every mixer: see ``loglinear.layers``."""
        levels = self.level_scale
        projected, dl = projections(hidden, self.in_proj, None if levels is None else levels.dl_proj)
        if state is not None and step.takes(self, projected, state, cu_seqlens):
            return self.out_proj(self._step(dl, projected, state)), state if output_state else None
        z, xBC, dt = projected.split(self.in_widths, dim=-1)
        xBC, conv_tail = convolve(self.conv, xBC, state, cu_seqlens, self.context_group)
        x, B, C = xBC.split(self.conv_widths, dim=-1)
        x = x.unflatten(-1, (self.num_heads, -1))

        v, g, x = self._discretise(x, dt)
        inputs = {
            "q": C.unflatten(-1, (self.num_groups, -1)),
            "k": B.unflatten(-1, (self.num_groups, -1)),
            "v": v,
            "g": g,
        }
        scales = None if levels is None else levels(hidden, dl)
        y, new_state = mix(
            inputs, scales, state, conv_tail, output_state, cu_seqlens, cu_seqlens_cpu, self.context_group
        )
        # The skip takes x as it is, not x·dt.
        return self.out_proj(self.norm(y.flatten(-2), z, x.flatten(-2), self.D)), new_state

    def _discretise(self, x: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """v = x·dt and x ``[B, T, H, V]``, and g ``[B, T, H]``, after the softplus of dt ``[B, T, H]``."""
        if pointwise.has_kernels(x, dt, self.dt_bias, self.A_log):
            return pointwise.discretise(x, dt, self.dt_bias, self.A_log)
        dt = F.softplus(wide(dt) + wide(self.dt_bias))
        return (x * dt.unsqueeze(-1)).to(x.dtype), -torch.exp(wide(self.A_log)) * dt, x

    def _step(self, dl: Tensor | None, projected: Tensor, state: RecurrentMixerState) -> Tensor:
        """``forward`` from the input to the output projection where ``step.takes`` it."""
        inner, channels, _ = self.in_widths
        columns = Columns(conv=inner, rate=inner + channels, scaled=inner)
        mixed, v, gates = step.convolve_and_gate(self, dl, projected, state, columns)
        assert v is not None
        x, B, C = mixed.split(self.conv_widths, dim=-1)
        q, k = (y.unflatten(-1, (self.num_groups, -1)) for y in (C, B))
        y = step.recur(q, k, v.unflatten(-1, (self.num_heads, -1)), gates, state)
        return step.gate_and_norm(self, y, projected[..., :inner], state, skip=(x, self.D))
