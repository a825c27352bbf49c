"""MIXERS: every mixer by its name, with all that models, commands and documents must know of it.

A new mixer is a module with its class and a line here. Its options are fields of ``LogLinearConfig``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from loglinear.layers.attention import SoftmaxAttention
from loglinear.layers.gated_deltanet import LogLinearGatedDeltaNet
from loglinear.layers.gla import LogLinearGLA
from loglinear.layers.kda import LogLinearKDA
from loglinear.layers.mamba2 import LogLinearMamba2
from loglinear.layers.mixer import RecurrentMixer
from loglinear.layers.retention import LogLinearRetention, lightning_factor


@dataclass(frozen=True)
class MixerKind:
    """The facts about one mixer.

    Attributes:
        title: of a model of this mixer, in tables and figures.
        layer: its class, which takes the hidden size first.
        arguments: other arguments of the class, each with the field of the config that has its value.
        fixed: arguments that are the same in every config.
        by_layer: arguments that follow from the number of a layer and the number of layers.
        twin: name of the linear mixer that differs in λ alone; None for a mixer without λ.
    """

    title: str
    layer: type[nn.Module]
    arguments: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    by_layer: Mapping[str, Callable[[int, int], Any]] = field(default_factory=dict)
    twin: str | None = None

    @property
    def recurrent(self) -> bool:
        """Whether its memory is a state, and not the keys and values of all tokens."""
        return issubclass(self.layer, RecurrentMixer)

    def build(self, config: Any, layer: int = 0) -> nn.Module:
        """The mixer of this layer at the sizes of a ``LogLinearConfig``."""
        arguments = {name: getattr(config, field) for name, field in self.arguments.items()}
        placed = {name: of(layer, config.num_hidden_layers) for name, of in self.by_layer.items()}
        return self.layer(config.hidden_size, **arguments, **self.fixed, **placed)


def _pair(
    name: str,
    title: str,
    layer: type[RecurrentMixer],
    arguments: Mapping[str, str],
    fixed: Mapping[str, Any] | None = None,
    by_layer: Mapping[str, Callable[[int, int], Any]] | None = None,
) -> dict[str, MixerKind]:
    """A log-linear mixer and its linear twin, which are one class."""
    fixed, by_layer = fixed or {}, by_layer or {}
    arguments = {one: field for one, field in {**_EVERY_RECURRENT, **arguments}.items() if one not in fixed}
    log_linear, linear = ({**fixed, "log_linear": form} for form in (True, False))
    return {
        f"log_linear_{name}": MixerKind(f"Log-Linear {title}", layer, arguments, log_linear, by_layer, twin=name),
        name: MixerKind(title, layer, arguments, linear, by_layer),
    }


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
_KDA = _behind(
    "kda",
    "num_heads num_key_heads key_dim value_dim conv_bias decay_rank gate_rank gate_bias decay_bound neg_eigval",
)
_GLA = {"conv_width": "gla_conv_size"} | _behind(
    "gla",
    "num_heads num_kv_heads key_dim value_dim conv_bias qk_activation gate_activation decay_rank decay_normalizer decay_min",
)
_RETNET = {"conv_width": "retnet_conv_size"} | _behind(
    "retnet", "num_heads num_kv_heads key_dim value_dim conv_bias qk_activation gate_activation"
)
_LIGHTNING = {
    "num_heads": "lightning_num_heads",
    "key_dim": "lightning_head_dim",
    "value_dim": "lightning_head_dim",
}
_AS_MINIMAX = {
    "conv_width": 0,
    "conv_activation": "silu",
    "gate_activation": "sigmoid",
    "norm_per_head": False,
    "decays": "slopes",
    "rotary_base": None,
}
_ATTENTION = {
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rope_theta": "rope_theta",
}

MIXERS: dict[str, MixerKind] = {
    **_pair("mamba2", "Mamba-2", LogLinearMamba2, _MAMBA2),
    **_pair("gated_deltanet", "Gated DeltaNet", LogLinearGatedDeltaNet, _DELTA),
    **_pair("kda", "KDA", LogLinearKDA, _KDA),
    **_pair("gla", "GLA", LogLinearGLA, _GLA),
    **_pair("retnet", "RetNet", LogLinearRetention, _RETNET),
    **_pair(
        *("lightning", "Lightning Attention", LogLinearRetention, _LIGHTNING),
        fixed=_AS_MINIMAX,
        by_layer={"decay_factor": lightning_factor},
    ),
    "attention": MixerKind("Transformer", SoftmaxAttention, _ATTENTION),
}
LIFTED = {kind.twin: name for name, kind in MIXERS.items() if kind.twin is not None}  # linear to log-linear
