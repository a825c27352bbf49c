"""LogLinearGatedDeltaNet: a Gated DeltaNet block that reads O(log T) states; with ``log_linear=False`` it is Gated DeltaNet.

One call of ``log_linear_delta_rule`` is the whole sequence mixing, on keys of unit length. The two models differ by
``level_scale`` alone. λ would cancel a query scale 1/sqrt(K), so there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.layers import step
from loglinear.layers.activations import ACTIVATIONS, check_activation
from loglinear.layers.conv import ShortConvolution
from loglinear.layers.initialization import initial_A_log, initial_dt_bias, wide
from loglinear.layers.level_scale import LevelScale, Start
from loglinear.layers.mixer import RecurrentMixer, Streams
from loglinear.layers.norm import GatedRMSNorm, RMSNorm
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
        conv_bias: of the convolution. conv_width 0 leaves its activation alone.
        gate_activation: of the output gate, which comes after the norm; None: no gate.
        decay: whether states decay; False is DeltaNet. use_beta: whether β is a projection's sigmoid; False is 1.
        neg_eigval: whether β is doubled, so that a transition may have negative eigenvalues.
        qk_activation: behind the convolution of q and k; v has SiLU. qk_norm: "l2", division by the length, or "sum", by the
            sum of absolute values.

    The fields from conv_bias on are what published models of the delta rule differ in. On CUDA some of their calls run in
    plain PyTorch.

    Source: Yang et al. 2024 (Gated DeltaNet, block); Guo et al. 2025, section 3.4 (levels).
    """

    no_weight_decay = frozenset({"A_log", "dt_bias"})
    dt_bias: nn.Parameter | None  # type: ignore[assignment]
    A_log: nn.Parameter | None  # type: ignore[assignment]

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
        *,
        conv_bias: bool = False,
        gate_activation: str | None = "silu",
        decay: bool = True,
        use_beta: bool = True,
        neg_eigval: bool = False,
        qk_activation: str = "silu",
        qk_norm: Literal["l2", "sum"] = "l2",
    ) -> None:
        super().__init__()
        num_key_heads = num_heads if num_key_heads is None else num_key_heads
        if min(num_heads, num_key_heads) < 1 or num_heads % num_key_heads:
            raise ValueError(f"num_heads must be a positive multiple of num_key_heads={num_key_heads}: got {num_heads}")
        if qk_norm not in ("l2", "sum"):
            raise ValueError(f"qk_norm must be 'l2' or 'sum': got {qk_norm!r}")
        self.num_heads, self.num_key_heads = num_heads, num_key_heads
        self.decay, self.use_beta, self.neg_eigval = decay, use_beta, neg_eigval
        self.qk_activation = check_activation(qk_activation, "qk_activation")
        self.unit_length = qk_norm == "l2"
        keys, values = num_key_heads * key_dim, num_heads * value_dim
        self.conv_widths = [keys, keys, values]  # q, k, v
        others = (gate_activation is not None, values), (decay, num_heads), (use_beta, num_heads)  # gate, a, b
        self.in_widths = [sum(self.conv_widths), *(width if there else 0 for there, width in others)]
        self.in_proj = nn.Linear(hidden_size, sum(self.in_widths), bias=False)
        activation = "silu" if self.qk_activation == "silu" else "identity"
        self.conv = ShortConvolution(sum(self.conv_widths), conv_width, conv_bias, activation)
        self.dt_bias = nn.Parameter(torch.empty(num_heads)) if decay else None
        self.A_log = nn.Parameter(torch.empty(num_heads)) if decay else None
        self.level_scale = LevelScale(hidden_size, num_heads, num_levels, level_scale_start) if log_linear else None
        self.norm = RMSNorm(value_dim, norm_eps)
        if gate_activation is not None:
            self.norm = GatedRMSNorm(value_dim, norm_eps, activation=gate_activation)
        self.out_proj = nn.Linear(values, hidden_size, bias=False)
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """Time steps log-uniform in [1e-3, 1e-1]; rates A uniform in (0, 16), kept off 0 for the log (Yang et al. 2024)."""
        if self.A_log is None:
            return {}
        heads, device = self.num_heads, self.A_log.device
        return {"dt_bias": initial_dt_bias(heads, device), "A_log": initial_A_log(heads, device, 1e-2, 16.0)}

    def project(self, hidden: Tensor) -> Streams:
        joined, dl = self.joint(hidden)
        qkv, gate, a, b = joined.split(self.in_widths, dim=-1)
        return Streams(conv=qkv, gate=gate, rate=a, strength=b, dl=dl, joined=joined)

    def inputs(self, mixed: Tensor, streams: Streams) -> tuple[dict[str, Tensor], Tensor | None]:
        q, k, v = mixed.split(self.conv_widths, dim=-1)
        q, k = (x.unflatten(-1, (self.num_key_heads, -1)) for x in (q, k))
        if self.qk_activation != "silu":
            q, k, v = self._activated(q), self._activated(k), F.silu(v)
        if not self.unit_length:
            q, k = (F.normalize(wide(x), p=1, dim=-1, eps=1e-6).to(x.dtype) for x in (q, k))
        assert streams.strength is not None
        g, beta = self._gates(streams.rate, streams.strength)
        return {"q": q, "k": k, "v": v.unflatten(-1, (self.num_heads, -1)), "g": g, "beta": beta}, None

    def _activated(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.qk_activation](x)

    def outputs(self, o: Tensor, gate: Tensor, skip: Tensor | None) -> Tensor:
        gates = (gate.unflatten(-1, (self.num_heads, -1)),) if isinstance(self.norm, GatedRMSNorm) else ()
        return self.out_proj(self.norm(o, *gates).flatten(-2))

    def _gates(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """g and β ``[B, T, H]`` of the projections a and b."""
        dt_bias, A_log = self.dt_bias, self.A_log
        if dt_bias is None or A_log is None:
            beta = self._strength(b, (*a.shape[:2], self.num_heads))
            return torch.zeros_like(beta), beta
        if self.use_beta and pointwise.has_kernels(a, b, dt_bias, A_log):
            g, beta = pointwise.gates(a, dt_bias, A_log, b)
            return g, 2 * beta if self.neg_eigval else beta
        return -torch.exp(wide(A_log)) * F.softplus(wide(a) + wide(dt_bias)), self._strength(b, a.shape)

    def _strength(self, b: Tensor, shape: Sequence[int]) -> Tensor:
        """β of this shape."""
        beta = torch.sigmoid(wide(b)) if self.use_beta else wide(b).new_ones(shape)
        return 2 * beta if self.neg_eigval else beta

    def unfused(self) -> str | None:
        fields = {
            "no decay": not self.decay,
            "a β of 1": not self.use_beta,
            "a sum norm of q and k": not self.unit_length,
        }
        return next((field for field, there in fields.items() if there), None) or super().unfused()

    def fused_step(self, streams: Streams, state: RecurrentMixerState) -> Tensor:
        channels, values, heads, _ = self.in_widths
        columns = Columns(conv=0, rate=channels + values, beta=channels + values + heads)
        mixed, _, gates = step.convolve_and_gate(self, streams, state, columns)
        if self.neg_eigval:
            gates["beta"] = 2 * gates["beta"]
        q, k, v = mixed.split(self.conv_widths, dim=-1)
        q, k = (x.unflatten(-1, (self.num_key_heads, -1)) for x in (q, k))
        o = step.recur(q, k, v.unflatten(-1, (self.num_heads, -1)), gates, state)
        return step.gate_and_norm(self, o, streams.gate, state)
