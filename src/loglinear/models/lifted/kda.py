"""LiftedKDA: the Kimi Delta Attention of transformers, log-linear.

The originals multiply q by ``K^-1/2``. This mixer does not, so its norm has an eps of K times theirs, and the outputs are the
same. The module of the original makes the decays: whether they are bounded is known to this module alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loglinear.layers import LogLinearKDA
from loglinear.layers.initialization import wide
from loglinear.layers.linear import project
from loglinear.layers.mixer import Streams
from loglinear.models.lifted.mixer import NamesWithO, check_convolution, gated_norm_eps

_KNOWN_GATE = frozenset({"f_a_proj", "f_b_proj", "f_proj", "dt_bias", "A_log"})


class LiftedKDA(NamesWithO, LogLinearKDA):  # type: ignore[misc]
    """``KimiLinearDeltaAttention``, ``Glm5NextTextLinearAttention`` and ``BailingHybridDeltaAttention``, log-linear."""

    parts = frozenset(
        {"q_proj", "k_proj", "v_proj", "conv1d", "forget_gate", "b_proj", "g_a_proj", "g_b_proj", "g_proj"}
        | {"o_norm", "o_proj"}
    )
    like = "o_norm"  # the convolution is float32 in models of 16 bits

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    b_proj: nn.Module
    forget_gate: nn.Module

    @classmethod
    def fields(cls, original: Any) -> dict[str, Any]:
        check_convolution(original.conv1d)
        if original.conv1d.bias is not None:
            raise ValueError("conv1d must have no bias: got one")
        gate = original.forget_gate
        if surplus := sorted({*gate._parameters, *gate._buffers, *gate._modules} - _KNOWN_GATE):
            raise ValueError(f"forget_gate must have parts among {sorted(_KNOWN_GATE)}: got {', '.join(surplus)} too")
        return {
            "hidden_size": original.hidden_size,
            "num_heads": original.num_heads,
            "key_dim": original.head_dim,
            "value_dim": original.head_dim,
            "conv_width": original.conv_kernel_size,
            "norm_eps": gated_norm_eps(original.o_norm) * original.head_dim,
            "gate_activation": original.o_norm.activation,
        }

    def project(self, hidden: Tensor) -> Streams:
        qkv = torch.cat([project(hidden, layer) for layer in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        gate = hidden
        for name in ("g_a_proj", "g_b_proj", "g_proj"):
            if name in self._modules:
                gate = project(gate, self.get_submodule(name))
        g = self.forget_gate(hidden).flatten(-2)
        levels = self.level_scale
        dl = None if levels is None else project(hidden, levels.dl_proj)
        return Streams(conv=qkv, gate=gate, rate=g, strength=project(hidden, self.b_proj), dl=dl)

    def gates(self, f: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return f.unflatten(-1, (self.num_heads, -1)), torch.sigmoid(wide(b))
