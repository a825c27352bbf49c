"""LogLinearKDA: Kimi Delta Attention that reads O(log T) states; with ``log_linear=False`` it is Kimi Delta Attention.

It is the delta rule with a decay for each key channel. One call of ``log_linear_delta_rule`` is the whole sequence mixing, on
keys of unit length. λ would cancel a query scale 1/sqrt(K), so there is none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.layers.conv import ShortConvolution
from loglinear.layers.initialization import initial_A_log, initial_dt_bias, wide
from loglinear.layers.level_scale import LevelScale, Start
from loglinear.layers.linear import project
from loglinear.layers.mixer import RecurrentMixer, Streams
from loglinear.layers.norm import GatedRMSNorm
from loglinear.ops import pointwise


class LogLinearKDA(RecurrentMixer):
    """Log-Linear KDA mixer.

    ``g = -exp(A_log) · softplus(f + dt_bias)``, f a projection of the input; with a ``decay_bound`` b < 0 it is
    ``b · sigmoid(exp(A_log) · (f + dt_bias))``.

    Args:
        hidden_size: width of input and output.
        num_heads: H, value heads. key_dim: K, width of a query or key head. value_dim: V, width of a value head.
        num_key_heads: G, query/key heads; H is a multiple of it. None means H. Decays belong to value heads.
        num_levels: levels with a λ of their own; ``num_levels(longest context)`` gives every level one.
        conv_width: taps of the short convolution over (q, k, v); 0 leaves its SiLU alone. norm_eps: of the output norm.
        log_linear: whether to read the buckets of every level; False is the linear model.
        level_scale_start: where λ starts; see ``LevelScale``.
        conv_bias: of the convolution.
        decay_rank, gate_rank: width between the two matrices that f, and the output gate, are a product of. None is V, and
            0 is one whole matrix. gate_bias: of the second matrix of the gate.
        gate_activation: of the output gate, which comes after the norm.
        decay_bound: the greatest lower bound of g; None is no bound.
        neg_eigval: whether β is doubled, so that a transition may have negative eigenvalues.

    Source: Kimi Team 2025 (Kimi Linear), section 3 and 4; Guo et al. 2025, section 3.4 (levels).
    """

    no_weight_decay = frozenset({"A_log", "dt_bias"})
    unit_length = True

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
        decay_rank: int | None = None,
        gate_rank: int | None = None,
        gate_bias: bool = False,
        gate_activation: str = "sigmoid",
        decay_bound: float | None = None,
        neg_eigval: bool = False,
    ) -> None:
        super().__init__()
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
        self.num_heads, self.num_key_heads = num_heads, num_key_heads
        self.decay_bound, self.neg_eigval = decay_bound, neg_eigval
        keys, values, decays = num_key_heads * key_dim, num_heads * value_dim, num_heads * key_dim
        self.conv_widths = [keys, keys, values]  # q, k, v
        self.in_widths = [sum(self.conv_widths), gate_rank or values, decay_rank or decays, num_heads]  # …, gate, f, b
        self.in_proj = nn.Linear(hidden_size, sum(self.in_widths), bias=False)
        self.gate_proj = nn.Linear(gate_rank, values, bias=gate_bias) if gate_rank else None
        self.decay_proj = nn.Linear(decay_rank, decays, bias=False) if decay_rank else None
        self.conv = ShortConvolution(sum(self.conv_widths), conv_width, conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(decays))
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.level_scale = LevelScale(hidden_size, num_heads, num_levels, level_scale_start) if log_linear else None
        self.norm = GatedRMSNorm(value_dim, norm_eps, activation=gate_activation)
        self.out_proj = nn.Linear(values, hidden_size, bias=False)
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        """Time steps log-uniform in [1e-3, 1e-1]; rates A uniform in [1, 16], or 1 with a bound (flash-linear-attention)."""
        device, bounded = self.A_log.device, self.decay_bound is not None
        rates = torch.zeros_like(self.A_log) if bounded else initial_A_log(self.num_heads, device, 1.0, 16.0)
        return {"dt_bias": initial_dt_bias(self.dt_bias.shape[0], device), "A_log": rates}

    def project(self, hidden: Tensor) -> Streams:
        joined, dl = self.joint(hidden)
        qkv, gate, f, b = joined.split(self.in_widths, dim=-1)
        gate = gate if self.gate_proj is None else project(gate, self.gate_proj)
        f = f if self.decay_proj is None else project(f, self.decay_proj)
        return Streams(conv=qkv, gate=gate, rate=f, strength=b, dl=dl, joined=joined)

    def inputs(self, mixed: Tensor, streams: Streams) -> tuple[dict[str, Tensor], Tensor | None]:
        q, k, v = mixed.split(self.conv_widths, dim=-1)
        q, k = (x.unflatten(-1, (self.num_key_heads, -1)) for x in (q, k))
        assert streams.strength is not None
        g, beta = self.gates(streams.rate, streams.strength)
        return {"q": q, "k": k, "v": v.unflatten(-1, (self.num_heads, -1)), "g": g, "beta": beta}, None

    def gates(self, f: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """g ``[B, T, H, K]`` and β ``[B, T, H]`` of the projections f and b."""
        if pointwise.has_kernels(f, b, self.dt_bias, self.A_log):
            g, beta = pointwise.channel_gates(f, self.dt_bias, self.A_log, b, self.decay_bound)
        else:
            g, beta = self.decay(f), torch.sigmoid(wide(b))
        return g, 2 * beta if self.neg_eigval else beta

    def decay(self, f: Tensor) -> Tensor:
        """g ``[B, T, H, K]`` of f ``[B, T, H·K]``."""
        f = (wide(f) + wide(self.dt_bias)).unflatten(-1, (self.num_heads, -1))
        rate = torch.exp(wide(self.A_log)).view(-1, 1)
        if self.decay_bound is None:
            return -rate * F.softplus(f)
        return self.decay_bound * torch.sigmoid(rate * f)

    def outputs(self, o: Tensor, gate: Tensor, skip: Tensor | None) -> Tensor:
        return self.out_proj(self.norm(o, gate.unflatten(-1, (self.num_heads, -1))).flatten(-2))  # type: ignore[call-arg]
