"""LiftedLightning: the lightning attention of MiniMax, log-linear. Its cache is one of its own (``cache.py``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from loglinear.layers import LogLinearRetention
from loglinear.layers.initialization import wide
from loglinear.layers.linear import project
from loglinear.layers.mixer import Streams
from loglinear.models.lifted.mixer import LiftedMixer


class LiftedLightning(LiftedMixer, LogLinearRetention):
    """``MiniMaxLightningAttention``: rows of its projection stand head by head, and its decays are a buffer."""

    parts = frozenset({"act_fn", "norm", "qkv_proj", "out_proj", "output_gate", "slope_rate"}) | {
        *("query_decay", "key_decay", "diagonal_decay")
    }
    like = "norm"

    qkv_proj: nn.Module
    output_gate: nn.Module
    slope_rate: Tensor

    @classmethod
    def fields(cls, original: Any) -> dict[str, Any]:
        if not isinstance(original.act_fn, nn.SiLU) and type(original.act_fn).__name__ != "SiLUActivation":
            raise ValueError(f"act_fn must be SiLU: got {type(original.act_fn).__name__}")
        norm = original.norm
        if [*norm._parameters] != ["weight"] or not hasattr(norm, "variance_epsilon"):
            raise ValueError(f"norm must be an RMSNorm with a weight: got {type(norm).__name__}")
        return {
            "hidden_size": original.qkv_proj.in_features,
            "num_heads": original.num_attention_heads,
            "key_dim": original.head_dim,
            "value_dim": original.head_dim,
            "conv_width": 0,
            "norm_eps": norm.variance_epsilon,
            "conv_activation": "silu",
            "gate_activation": "sigmoid",
            "norm_per_head": False,
            "rotary_base": None,
        }

    def project(self, hidden: Tensor) -> Streams:
        rows = project(hidden, self.qkv_proj).unflatten(-1, (self.num_heads, 3, -1))
        qkv = rows.transpose(-3, -2).flatten(-3)  # q of all heads, k of all heads, v of all heads
        levels = self.level_scale
        dl = None if levels is None else project(hidden, levels.dl_proj)
        return Streams(conv=qkv, gate=project(hidden, self.output_gate), rate=qkv[..., :0], dl=dl, joined=qkv)

    def log_decay(self, device: torch.device) -> Tensor:
        return -wide(self.slope_rate).flatten()

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the original's, which also returns its state where attention returns its weights. Here None is returned."""
        return super().forward(hidden_states, attention_mask=attention_mask, cache=cache, **kwargs), None
