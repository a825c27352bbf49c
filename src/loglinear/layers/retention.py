"""LogLinearRetention: linear attention whose heads decay at fixed rates, and its log-linear form.

Two published models are presets of it. RetNet turns q and k by their positions. MiniMax's lightning attention has SiLU on
q, k and v, one norm over all heads, and slower decays in later layers.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from loglinear.layers.attention import rotary
from loglinear.layers.level_scale import Start
from loglinear.layers.linear_attention import LinearAttention
from loglinear.layers.mixer import Streams

Decays = Literal["retention", "slopes"]


def lightning_factor(layer: int, layers: int) -> float:
    """The factor of the logs of the decays in layer 0 … layers - 1 of a MiniMax model: later layers forget more slowly."""
    return 1 - layer / (layers - 1 + 1e-5) + 1e-5


def fixed_decays(kind: Decays, heads: int, device: torch.device) -> Tensor:
    """float32 ``[heads]``, natural logs of decays. "retention": ``ln(1 - 2^(-5-h))``; "slopes": ``-2^(-8(h+1)/heads)``.

    Source: Sun et al. 2023 (RetNet), section 2.2; Press et al. 2022 (ALiBi), whose slopes lightning attention takes over.
    """
    head = torch.arange(heads, device=device, dtype=torch.float32)
    if kind == "retention":
        return torch.log1p(-torch.exp2(-5.0 - head))
    return -torch.exp2((head + 1) * (-8.0 / heads))


class LogLinearRetention(LinearAttention):
    """Log-Linear retention mixer: the scalar gate, with a constant for each head.

    Args:
        decays: which constants; see ``fixed_decays``. decay_factor: of their logs.
        rotary_base: base of the rotary frequencies that turn q and k; None leaves them as they are.
        The others: as in ``LinearAttention``.

    Source: Sun et al. 2023 (RetNet); Qin et al. 2024 (Lightning Attention-2); Guo et al. 2025, section 3.4 (levels).
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
        decays: Decays = "retention",
        decay_factor: float = 1.0,
        rotary_base: float | None = 10_000.0,
    ) -> None:
        if decays not in get_args(Decays):
            raise ValueError(f"decays must be one of {list(get_args(Decays))}: got {decays!r}")
        if not decay_factor > 0:
            raise ValueError(f"decay_factor must be positive: got {decay_factor}")
        if rotary_base is not None and key_dim % 2:
            raise ValueError(f"key_dim must be even (rotary positions turn pairs): got {key_dim}")
        super().__init__(
            *(hidden_size, num_heads, key_dim, value_dim, num_kv_heads),
            *(num_levels, conv_width, norm_eps, log_linear, level_scale_start),
            conv_bias=conv_bias,
            conv_activation=conv_activation,
            qk_activation=qk_activation,
            gate_activation=gate_activation,
            norm_per_head=norm_per_head,
        )
        self.decays, self.decay_factor, self.rotary_base = decays, decay_factor, rotary_base
        self.reads_positions = rotary_base is not None

    def log_decay(self, device: torch.device) -> Tensor:
        """g of every token, float32 ``[H]``."""
        return fixed_decays(self.decays, self.num_heads, device) * self.decay_factor

    def decay(self, streams: Streams) -> Tensor:
        return self.log_decay(streams.conv.device).expand(*streams.conv.shape[:2], -1)

    def place(self, q: Tensor, k: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        if self.rotary_base is None:
            return q, k
        assert streams.position is not None
        q, k = rotary(streams.position, self.rotary_base, q, k)
        return q, k
