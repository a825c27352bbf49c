"""TENSORS: which tensors of another library make up each of our tensors.

Our tensors are rows of theirs, or several of theirs below each other: one input projection in place of six, one convolution
in place of three. A recipe is a list of such pieces. The weights of convolutions lose the middle one of their dimensions
``[channels, 1, taps]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loglinear.layers import LogLinearMamba2
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


def recipes(config: LogLinearConfig, ours: Shapes) -> Recipes:
    """The pieces of each of ``ours``, the tensors of a model of ``config`` without those of a lift."""
    mamba = MIXERS[config.layer_mixers[0]].layer is LogLinearMamba2
    found: Recipes = {}
    for name in ours:
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            layer, rest = parts[2], ".".join(parts[3:])
            found[name] = _mamba2(layer, rest, ours) if mamba else _delta(layer, rest, config)
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


def _delta(layer: str, rest: str, config: LogLinearConfig) -> list[Piece]:
    """Rows of our ``in_proj`` are q, k, v, the output gate, a and b; those of our ``conv`` are q, k and v."""
    prefix = f"model.layers.{layer}"
    if rest.startswith(("mlp.", "mlp_norm.")):
        return [Piece(f"{prefix}.{rest}")]
    if rest == "mixer_norm.weight":
        return [Piece(f"{prefix}.attn_norm.weight")]
    part, mixer = rest.removeprefix("mixer."), f"{prefix}.attn"
    if part == "in_proj.weight":
        there = {"g": config.delta_gate_activation is not None, "a": config.delta_decay, "b": config.delta_use_beta}
        return [Piece(f"{mixer}.{name}_proj.weight") for name in "qkvgab" if there.get(name, True)]
    if part.startswith("conv."):
        return [Piece(f"{mixer}.{name}_conv1d.{part.rpartition('.')[2]}") for name in "qkv"]
    renamed = {"level_scale.L": "L", "level_scale.dl_proj.weight": "l_proj.weight"}
    renamed |= {"norm.weight": "o_norm.weight", "out_proj.weight": "o_proj.weight"}
    return [Piece(f"{mixer}.{renamed.get(part, part)}")]
