"""LogLinearGLA: gated linear attention that reads O(log T) states; with ``log_linear=False`` it is gated linear attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from loglinear.layers.initialization import wide
from loglinear.layers.level_scale import Start
from loglinear.layers.linear_attention import LinearAttention
from loglinear.layers.mixer import Streams
from loglinear.ops import pointwise


class LogLinearGLA(LinearAttention):
    """Log-Linear GLA mixer: each key channel of each head has a decay of its own.

    ``g = logsigmoid(decay_proj(x)) / decay_normalizer``, and ``decay_proj`` is a product of two narrow matrices.

    Args:
        decay_rank: width between these two. decay_normalizer: a larger number forgets more slowly.
        decay_min: the least g; None is no limit.
        The others: as in ``LinearAttention``.

    Source: Yang et al. 2024 (Gated Linear Attention), section 4; Guo et al. 2025, section 3.4 (levels).
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
        qk_activation: str = "identity",
        gate_activation: str | None = "silu",
        decay_rank: int = 16,
        decay_normalizer: float = 16.0,
        decay_min: float | None = None,
    ) -> None:
        if decay_rank < 1:
            raise ValueError(f"decay_rank must be at least 1: got {decay_rank}")
        if decay_normalizer <= 0:
            raise ValueError(f"decay_normalizer must be positive: got {decay_normalizer}")
        super().__init__(
            *(hidden_size, num_heads, key_dim, value_dim, num_kv_heads),
            *(num_levels, conv_width, norm_eps, log_linear, level_scale_start),
            conv_bias=conv_bias,
            qk_activation=qk_activation,
            gate_activation=gate_activation,
            decay_rank=decay_rank,
        )
        self.decay_normalizer, self.decay_min = decay_normalizer, decay_min

    def decay(self, streams: Streams) -> Tensor:
        if pointwise.has_kernels(streams.rate):
            return pointwise.sigmoid_gates(streams.rate, self.num_kv_heads, self.decay_min, self.decay_normalizer)
        g = F.logsigmoid(wide(streams.rate)) / self.decay_normalizer
        g = g if self.decay_min is None else g.clamp_min(self.decay_min)
        return g.unflatten(-1, (self.num_kv_heads, -1))
