"""LogLinearGatedDeltaNet: a Gated DeltaNet block that reads O(log T) states; with ``log_linear=False`` it is Gated DeltaNet.

One call of ``log_linear_delta_rule`` is the whole sequence mixing, on keys of unit length. The two models differ by
``level_scale`` alone. λ would cancel a query scale 1/sqrt(K), so there is none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.layers import step
from loglinear.layers.conv import ShortConvolution
from loglinear.layers.initialization import initial_A_log, initial_dt_bias, wide
from loglinear.layers.level_scale import LevelScale, Start
from loglinear.layers.mixer import RecurrentMixer, Streams
from loglinear.layers.norm import GatedRMSNorm
from loglinear.layers.state import RecurrentMixerState
from loglinear.ops import pointwise
from loglinear.ops.fused import Columns


class LogLinearGatedDeltaNet(RecurrentMixer):
    """Log-Linear Gated DeltaNet mixer.

    Args:
        hidden_size: width of input and output.
        num_heads: H, value heads. key_dim: K, width of a query or key head. value_dim: V, width of a value head.
        num_key_heads: G, query/key heads; H is a multiple of it. None means H.
        num_levels: levels with a λ of their own; ``num_levels(longest context)`` gives every level one.
        conv_width: taps of the short convolution over (q, k, v). norm_eps: of the output norm.
        log_linear: whether to read the buckets of every level; False is the linear model.
        level_scale_start: where λ starts; see ``LevelScale``.

    Source: Yang et al. 2024 (Gated DeltaNet, block); Guo et al. 2025, section 3.4 (levels).
    """

    no_weight_decay = frozenset({"A_log", "dt_bias"})

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
        level_scale_start: Start = "paper",
    ) -> None:
        super().__init__()
        num_key_heads = num_heads if num_key_heads is None else num_key_heads
        if min(num_heads, num_key_heads) < 1 or num_heads % num_key_heads:
            raise ValueError(f"num_heads must be a positive multiple of num_key_heads={num_key_heads}: got {num_heads}")
        self.num_heads, self.num_key_heads = num_heads, num_key_heads
        keys, values = num_key_heads * key_dim, num_heads * value_dim
        self.conv_widths = [keys, keys, values]  # q, k, v
        self.in_widths = [sum(self.conv_widths), values, num_heads, num_heads]  # (q, k, v), gate, a, b
        self.in_proj = nn.Linear(hidden_size, sum(self.in_widths), bias=False)
        self.conv = ShortConvolution(sum(self.conv_widths), conv_width, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.level_scale = LevelScale(hidden_size, num_heads, num_levels, level_scale_start) if log_linear else None
        self.norm = GatedRMSNorm(value_dim, norm_eps)
        self.out_proj = nn.Linear(values, hidden_size, bias=False)
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """Time steps log-uniform in [1e-3, 1e-1]; rates A uniform in (0, 16), kept off 0 for the log (Yang et al. 2024)."""
        heads, device = self.num_heads, self.A_log.device
        return {"dt_bias": initial_dt_bias(heads, device), "A_log": initial_A_log(heads, device, 1e-2, 16.0)}

    def project(self, hidden: Tensor) -> Streams:
        joined, dl = self.joint(hidden)
        qkv, gate, a, b = joined.split(self.in_widths, dim=-1)
        return Streams(conv=qkv, gate=gate, rate=a, strength=b, dl=dl, joined=joined)

    def inputs(self, mixed: Tensor, streams: Streams) -> tuple[dict[str, Tensor], Tensor | None]:
        q, k, v = mixed.split(self.conv_widths, dim=-1)
        assert streams.strength is not None
        g, beta = self._gates(streams.rate, streams.strength)
        inputs = {
            "q": q.unflatten(-1, (self.num_key_heads, -1)),
            "k": k.unflatten(-1, (self.num_key_heads, -1)),
            "v": v.unflatten(-1, (self.num_heads, -1)),
            "g": g,
            "beta": beta,
        }
        return inputs, None

    def outputs(self, o: Tensor, gate: Tensor, skip: Tensor | None) -> Tensor:
        return self.out_proj(self.norm(o, gate.unflatten(-1, (self.num_heads, -1))).flatten(-2))

    def _gates(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """g and β ``[B, T, H]`` of the projections a and b."""
        if pointwise.has_kernels(a, b, self.dt_bias, self.A_log):
            return pointwise.gates(a, b, self.dt_bias, self.A_log)
        return -torch.exp(wide(self.A_log)) * F.softplus(wide(a) + wide(self.dt_bias)), torch.sigmoid(wide(b))

    def fused_step(self, streams: Streams, state: RecurrentMixerState) -> Tensor:
        channels, values, heads, _ = self.in_widths
        columns = Columns(conv=0, rate=channels + values, beta=channels + values + heads)
        mixed, _, gates = step.convolve_and_gate(self, streams, state, columns)
        q, k, v = mixed.split(self.conv_widths, dim=-1)
        q, k = (x.unflatten(-1, (self.num_key_heads, -1)) for x in (q, k))
        o = step.recur(q, k, v.unflatten(-1, (self.num_heads, -1)), gates, state)
        return step.gate_and_norm(self, o, streams.gate, state)
