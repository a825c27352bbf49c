"""The Gated DeltaNet mixers of transformers, log-linear: one class for each layout of the input projections.

Two facts of the originals are kept by the fields of our mixer:

* They multiply q by ``K^-1/2``. Ours does not, so its norm sees numbers that are larger by ``K^1/2``, and its eps is K times
  theirs. The outputs are the same, since a norm takes no notice of a factor beside its eps.
* OLMo hybrid multiplies β by two (``neg_eigval``).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from loglinear.layers import LogLinearGatedDeltaNet
from loglinear.layers.linear import project
from loglinear.layers.mixer import Streams
from loglinear.models.lifted.mixer import LiftedMixer, NamesWithO, check_convolution, gated_norm_eps
from loglinear.ops import fused
from loglinear.state import CHUNK_SIZE

_SHARED = frozenset({"conv1d", "dt_bias", "A_log"})


class LiftedGatedDeltaNet(LiftedMixer, LogLinearGatedDeltaNet):
    """Base of the lifted Gated DeltaNet mixers. A subclass says where q, k, v, the gate, a and b come from."""

    @classmethod
    def fields(cls, original: Any) -> dict[str, Any]:
        check_convolution(original.conv1d)
        if original.conv1d.bias is not None:
            raise ValueError("conv1d must have no bias: got one")
        norm = getattr(original, cls.norm_name)
        return {
            "hidden_size": original.hidden_size,
            "num_heads": original.num_v_heads,
            "num_key_heads": original.num_k_heads,
            "key_dim": original.head_k_dim,
            "value_dim": original.head_v_dim,
            "conv_width": original.conv_kernel_size,
            "norm_eps": gated_norm_eps(norm) * original.head_k_dim,
            "gate_activation": norm.activation,
            "neg_eigval": getattr(original, "allow_neg_eigval", False),
        }

    @abstractmethod
    def streams(self, hidden: Tensor) -> list[Tensor]:
        """(q, k, v) ``[B, T, channels]``, gate ``[B, T, H·V]``, a and b ``[B, T, H]`` of hidden ``[B, T, hidden_size]``."""

    def project(self, hidden: Tensor) -> Streams:
        qkv, gate, a, b = parts = self.streams(hidden)
        joined = None
        if hidden.shape[1] <= CHUNK_SIZE and fused.fits(hidden):
            joined = torch.cat(parts, dim=-1)  # the kernels of a step read columns of one tensor
        levels = self.level_scale
        dl = None if levels is None else project(hidden, levels.dl_proj)
        return Streams(conv=qkv, gate=gate, rate=a, strength=b, dl=dl, joined=joined)


class LiftedInterleavedDeltaNet(LiftedGatedDeltaNet):
    """``Qwen3NextGatedDeltaNet``: the rows of both projections stand key head by key head."""

    parts = _SHARED | {"in_proj_qkvz", "in_proj_ba", "norm", "out_proj"}

    in_proj_qkvz: nn.Module
    in_proj_ba: nn.Module

    def streams(self, hidden: Tensor) -> list[Tensor]:
        keys, _, values = (width // self.num_key_heads for width in self.conv_widths)
        heads = self.num_heads // self.num_key_heads
        qkvz = project(hidden, self.in_proj_qkvz).unflatten(-1, (self.num_key_heads, -1))
        ba = project(hidden, self.in_proj_ba).unflatten(-1, (self.num_key_heads, -1))
        q, k, v, z = (x.flatten(-2) for x in qkvz.split([keys, keys, values, values], dim=-1))
        b, a = (x.flatten(-2) for x in ba.split([heads, heads], dim=-1))
        return [torch.cat([q, k, v], dim=-1), z, a, b]


class LiftedSeparateDeltaNet(LiftedGatedDeltaNet):
    """The mixers of Qwen3.5 and Qwen3.5-MoE: one projection for (q, k, v), and one for each of gate, b and a."""

    parts = _SHARED | {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "norm", "out_proj"}

    in_proj_qkv: nn.Module
    in_proj_z: nn.Module
    in_proj_b: nn.Module
    in_proj_a: nn.Module

    def streams(self, hidden: Tensor) -> list[Tensor]:
        layers = (self.in_proj_qkv, self.in_proj_z, self.in_proj_a, self.in_proj_b)
        return [project(hidden, layer) for layer in layers]


class LiftedOlmoDeltaNet(NamesWithO, LiftedGatedDeltaNet):
    """``OlmoHybridGatedDeltaNet``: a projection for each of q, k, v, gate, a and b, and names of its own."""

    parts = _SHARED | {"q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_norm", "o_proj"}
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    g_proj: nn.Module
    a_proj: nn.Module
    b_proj: nn.Module

    def streams(self, hidden: Tensor) -> list[Tensor]:
        qkv = torch.cat([project(hidden, layer) for layer in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        return [qkv, *(project(hidden, layer) for layer in (self.g_proj, self.a_proj, self.b_proj))]
