"""LinearAttention: the base of the mixers whose states decay and are never corrected. A kind of mixer adds its decay.

Queries, keys and values are projections, with or without a convolution, and ``log_linear_attention`` is the whole sequence
mixing. A query scale 1/sqrt(K) would stand before a norm: it changes nothing beside the norm's eps, so there is none.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from loglinear.layers.activations import ACTIVATIONS, check_activation
from loglinear.layers.conv import ShortConvolution
from loglinear.layers.level_scale import LevelScale, Start
from loglinear.layers.linear import project
from loglinear.layers.mixer import RecurrentMixer, Streams
from loglinear.layers.norm import GatedRMSNorm, RMSNorm


class LinearAttention(RecurrentMixer):
    """Base of ``LogLinearGLA`` and ``LogLinearRetention``.

    Args:
        hidden_size: width of input and output.
        num_heads: H, query heads and states. key_dim: K, width of a query or key head. value_dim: V, width of a value head.
        num_kv_heads: key and value heads, a divisor of H; each serves H / num_kv_heads query heads. None means H.
        num_levels: levels with a λ of their own; ``num_levels(longest context)`` gives every level one.
        conv_width: taps of a short convolution over (q, k, v); 0 is none. norm_eps: of the output norm.
        log_linear: whether to read the buckets of every level; False is the linear model.
        level_scale_start: where λ starts; see ``LevelScale``.
        conv_bias: of the convolution. conv_activation: of q, k and v, behind the convolution if there is one; None is SiLU
            behind a convolution and nothing without.
        qk_activation: of q and k alone, behind that.
        gate_activation: of the output gate, which comes after the norm; None: no gate.
        norm_per_head: whether each head of the output is normalised by itself, with one weight for all heads.
        decay_rank: width between the two matrices whose product projects the input to the decays of all key channels; 0 is
            no such projection.
    """

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
        level_scale_start: Start = "paper",
        *,
        conv_bias: bool = False,
        conv_activation: str | None = None,
        qk_activation: str = "identity",
        gate_activation: str | None = "silu",
        norm_per_head: bool = True,
        decay_rank: int = 0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(num_heads, num_kv_heads) < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a positive multiple of num_kv_heads={num_kv_heads}: got {num_heads}")
        self.num_heads, self.num_kv_heads, self.norm_per_head = num_heads, num_kv_heads, norm_per_head
        self.qk_activation = check_activation(qk_activation, "qk_activation")
        if conv_activation is None:
            conv_activation = "silu" if conv_width else "identity"
        self.conv_widths = [num_heads * key_dim, num_kv_heads * key_dim, num_kv_heads * value_dim]  # q, k, v
        values = num_heads * value_dim
        self.in_widths = [sum(self.conv_widths), 0 if gate_activation is None else values, decay_rank]
        self.in_proj = nn.Linear(hidden_size, sum(self.in_widths), bias=False)
        self.decay_proj = nn.Linear(decay_rank, num_kv_heads * key_dim) if decay_rank else None
        self.conv = ShortConvolution(sum(self.conv_widths), conv_width, conv_bias, conv_activation)
        self.level_scale = LevelScale(hidden_size, num_heads, num_levels, level_scale_start) if log_linear else None
        width = value_dim if norm_per_head else values
        self.norm = RMSNorm(width, norm_eps)
        if gate_activation is not None:
            self.norm = GatedRMSNorm(width, norm_eps, activation=gate_activation)
        self.out_proj = nn.Linear(values, hidden_size, bias=False)

    def initial_values(self) -> dict[str, Tensor]:
        return {}

    @abstractmethod
    def decay(self, streams: Streams) -> Tensor:
        """g, ``[B, T, H]``, or ``[B, T, num_kv_heads, K]`` for each key channel."""

    def project(self, hidden: Tensor) -> Streams:
        joined, dl = self.joint(hidden)
        qkv, gate, rate = joined.split(self.in_widths, dim=-1)
        rate = rate if self.decay_proj is None else project(rate, self.decay_proj)
        return Streams(conv=qkv, gate=gate, rate=rate, dl=dl, joined=joined)

    def inputs(self, mixed: Tensor, streams: Streams) -> tuple[dict[str, Tensor], Tensor | None]:
        q, k, v = mixed.split(self.conv_widths, dim=-1)
        q, k, v = (
            x.unflatten(-1, (heads, -1))
            for x, heads in ((q, self.num_heads), (k, self.num_kv_heads), (v, self.num_kv_heads))
        )
        if self.qk_activation != "identity":
            q, k = (ACTIVATIONS[self.qk_activation](x) for x in (q, k))
        q, k = self.place(q, k, streams)
        inputs = {"q": q, "k": k, "v": v, "g": self.decay(streams)}
        if self.num_kv_heads < self.num_heads:
            inputs = {name: self._for_each_query(x) for name, x in inputs.items()}
        return inputs, None

    def place(self, q: Tensor, k: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """q and k ``[B, T, heads, K]`` with what their positions do to them."""
        return q, k

    def _for_each_query(self, x: Tensor) -> Tensor:
        """A tensor ``[B, T, heads, ...]`` of the key heads, with a head for each query head."""
        return x if x.shape[2] == self.num_heads else x.repeat_interleave(self.num_heads // x.shape[2], dim=2)

    def outputs(self, o: Tensor, gate: Tensor, skip: Tensor | None) -> Tensor:
        if self.norm_per_head:
            gate = gate.unflatten(-1, (self.num_heads, -1))
        else:
            o = o.flatten(-2)
        o = self.norm(o, gate) if isinstance(self.norm, GatedRMSNorm) else self.norm(o)
        return self.out_proj(o.flatten(-2) if self.norm_per_head else o)

    def unfused(self) -> str | None:
        return (self.conv.unfused() if self.conv.width else None) or self.norm.unfused()
