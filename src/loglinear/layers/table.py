"""MIXERS: every mixer by its name, with all that models, commands and documents must know of it.

A new mixer is a module with its class and a line here. Its options are fields of ``LogLinearConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from loglinear.layers.attention import SoftmaxAttention
from loglinear.layers.gated_deltanet import LogLinearGatedDeltaNet
from loglinear.layers.mamba2 import LogLinearMamba2
from loglinear.layers.mixer import RecurrentMixer


@dataclass(frozen=True)
class MixerKind:
    """The facts about one mixer.

    Attributes:
        title: of a model of this mixer, in tables and figures.
        layer: its class, which takes the hidden size first.
        arguments: other arguments of the class, each with the field of the config that has its value.
        fixed: arguments that are the same in every config.
        twin: name of the linear mixer that differs in λ alone; None for a mixer without λ.
    """

    title: str
    layer: type[nn.Module]
    arguments: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    twin: str | None = None

    @property
    def recurrent(self) -> bool:
        """Whether its memory is a state, and not the keys and values of all tokens."""
        return issubclass(self.layer, RecurrentMixer)

    def build(self, config: Any) -> nn.Module:
        """The mixer at the sizes of a ``LogLinearConfig``."""
        arguments = {name: getattr(config, field) for name, field in self.arguments.items()}
        return self.layer(config.hidden_size, **arguments, **self.fixed)


def _pair(
    name: str, title: str, layer: type[RecurrentMixer], arguments: Mapping[str, str], **fixed: Any
) -> dict[str, MixerKind]:
    """A log-linear mixer and its linear twin, which are one class."""
    arguments = {**_EVERY_RECURRENT, **arguments}
    log_linear = MixerKind(f"Log-Linear {title}", layer, arguments, fixed | {"log_linear": True}, twin=name)
    return {f"log_linear_{name}": log_linear, name: MixerKind(title, layer, arguments, fixed | {"log_linear": False})}


def _behind(prefix: str, names: str) -> dict[str, str]:
    """Arguments of these names, whose fields have the names behind ``prefix``."""
    return {name: f"{prefix}_{name}" for name in names.split()}


_EVERY_RECURRENT = {
    "num_levels": "num_levels",
    "conv_width": "conv_size",
    "norm_eps": "mixer_norm_eps",
    "level_scale_start": "level_scale_start",
}
_MAMBA2 = {"level_scale_bias": "level_scale_bias"} | _behind(
    "mamba",
    "head_dim num_heads state_size num_groups use_bias conv_bias norm norm_groups norm_before_gate dt_limit skip_per_channel",
)
_DELTA = _behind(
    "delta",
    "num_heads num_key_heads key_dim value_dim conv_bias gate_activation decay use_beta neg_eigval qk_activation qk_norm",
)
_ATTENTION = {
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rope_theta": "rope_theta",
}

MIXERS: dict[str, MixerKind] = {
    **_pair("mamba2", "Mamba-2", LogLinearMamba2, _MAMBA2),
    **_pair("gated_deltanet", "Gated DeltaNet", LogLinearGatedDeltaNet, _DELTA),
    "attention": MixerKind("Transformer", SoftmaxAttention, _ATTENTION),
}
LIFTED = {kind.twin: name for name, kind in MIXERS.items() if kind.twin is not None}  # linear to log-linear
