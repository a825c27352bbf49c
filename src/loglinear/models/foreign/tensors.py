"""TENSORS: which tensors of another library make up each of our tensors.

Our tensors are rows of theirs, or several of theirs below each other: one input projection in place of six, one convolution
in place of three. A recipe is a list of such pieces. The weights of convolutions lose the middle one of their dimensions
``[channels, 1, taps]``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from loglinear.layers import LogLinearGLA, LogLinearKDA, LogLinearMamba2, LogLinearRetention
from loglinear.layers.table import MIXERS

if TYPE_CHECKING:
    from loglinear.models.configuration import LogLinearConfig

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of a tensor of the other library; None is its end."""

    name: str
    start: int = 0
    stop: int | None = None


Recipes = dict[str, list[Piece]]


def recipes(config: LogLinearConfig, ours: Shapes, theirs: Collection[str]) -> Recipes:
    """The pieces of each of ``ours``, the tensors of a model of ``config`` without those of a lift.

    theirs: names of the tensors of the other library.
    """
    layers = [MIXERS[name].layer for name in config.layer_mixers]
    mamba = layers[0] is LogLinearMamba2
    found: Recipes = {}
    for name in ours:
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            layer, rest = parts[2], ".".join(parts[3:])
            if mamba:
                found[name] = _mamba2(layer, rest, ours)
            else:
                found[name] = _attention(layer, rest, _names_of(layers[int(layer)], config), theirs)
        else:
            found[name] = [Piece(_outside(name, mamba))]
    return found


def _outside(name: str, mamba: bool) -> str:
    """Tensors that belong to no layer."""
    base = "backbone" if mamba else "model"
    theirs = {
        "model.embed_tokens.weight": f"{base}.embeddings.weight",
        "model.norm.weight": f"{base}.norm_f.weight" if mamba else f"{base}.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    return theirs[name]


def _mamba2(layer: str, rest: str, ours: Shapes) -> list[Piece]:
    """Rows of ``in_proj`` are z, x, B, C, dt and, of a log-linear model, dl head by head."""
    prefix, mixer = f"backbone.layers.{layer}", f"model.layers.{layer}.mixer"
    log_linear = f"{mixer}.level_scale.L" in ours
    if rest.startswith(("mlp.", "mlp_norm.")):
        return [Piece(f"{prefix}.{rest}")]
    if rest == "mixer_norm.weight":
        return [Piece(f"{prefix}.{'mixer_norm' if log_linear else 'norm'}.weight")]
    part, kind = rest.removeprefix("mixer."), rest.rpartition(".")[2]
    if part.startswith(("in_proj.", "level_scale.dl_proj.")) and log_linear:
        rows = ours[f"{mixer}.in_proj.{kind}"][0]
        start, stop = (0, rows) if part.startswith("in_proj.") else (rows, None)
        return [Piece(f"{prefix}.mixer.in_proj.{kind}", start, stop)]
    renamed = part.replace("conv.", "conv1d.").removeprefix("level_scale.")
    return [Piece(f"{prefix}.mixer.{renamed}")]


def _names_of(layer: type[nn.Module], config: LogLinearConfig) -> tuple[list[str], dict[str, str]]:
    """Their modules whose rows make up our ``in_proj``, in order, and their names of others that are not called as ours."""
    renamed = {"level_scale.L": "L", "level_scale.dl_proj": "l_proj", "norm": "o_norm", "out_proj": "o_proj"}
    qkv = ["q_proj", "k_proj", "v_proj"]
    if layer is LogLinearKDA:
        return [*qkv, "g_proj.0", "f_proj.0", "b_proj"], renamed | {"gate_proj": "g_proj.1", "decay_proj": "f_proj.1"}
    if layer is LogLinearGLA:
        gate = ["g_proj"] if config.gla_gate_activation is not None else []
        return [*qkv, *gate, "gk_proj.0"], renamed | {"norm": "g_norm", "decay_proj": "gk_proj.1"}
    if layer is LogLinearRetention:
        gate = ["g_proj"] if config.retnet_gate_activation is not None else []
        return [*qkv, *gate], renamed | {"norm": "g_norm"}
    there = {"g": config.delta_gate_activation is not None, "a": config.delta_decay, "b": config.delta_use_beta}
    return [f"{name}_proj" for name in "qkvgab" if there.get(name, True)], renamed


def _attention(layer: str, rest: str, names: tuple[list[str], dict[str, str]], theirs: Collection[str]) -> list[Piece]:
    """A tensor of a layer whose mixer is called ``attn``. The rows of our ``conv`` are q, k and v."""
    prefix, (rows, renamed) = f"model.layers.{layer}", names
    if rest.startswith(("mlp.", "mlp_norm.")):
        return [Piece(f"{prefix}.{rest}")]
    if rest == "mixer_norm.weight":
        return [Piece(f"{prefix}.attn_norm.weight")]
    part, mixer = rest.removeprefix("mixer."), f"{prefix}.attn"
    if part == "in_proj.weight":
        return [Piece(f"{mixer}.{name}.weight") for name in rows]
    if part.startswith("conv."):
        return [Piece(f"{mixer}.{name}_conv1d.{part.rpartition('.')[2]}") for name in "qkv"]
    module, _, tensor = part.rpartition(".")
    name = f"{mixer}.{renamed.get(part) or '.'.join(filter(None, (renamed.get(module, module), tensor)))}"
    fused = name.replace(".g_norm.", ".g_norm_swish_gate.")  # a norm and its gate in one module
    return [Piece(fused if fused in theirs else name)]
