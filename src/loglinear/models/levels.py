"""LEVELS: the parameters that a lift adds, found in any model: what they are, and training them alone."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from loglinear.layers import LevelScale

Trained = Literal["all", "levels"]
TRAINED: tuple[Trained, ...] = ("all", "levels")
FIELD = "loglinear_levels"  # of the config of a lifted model, and of the metadata of a file of levels


def level_scales(model: nn.Module) -> dict[str, LevelScale]:
    """The λ modules of ``model`` by name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LevelScale)}


def level_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all ``level_scales`` by name: L and the projection of every log-linear layer."""
    return {
        f"{name}.{inner}": parameter
        for name, module in level_scales(model).items()
        for inner, parameter in module.named_parameters()
    }


def check_trained(train: str) -> None:
    """Raise ValueError for a word that ``train_only`` does not know."""
    if train not in TRAINED:
        raise ValueError(f"train must be one of {list(TRAINED)}: got {train!r}")


def train_only(model: nn.Module, train: Trained) -> None:
    """Choose what an optimizer may change. "levels": λ's parameters alone, all others are frozen. "all": left as it is."""
    check_trained(train)
    if train == "levels":
        model.requires_grad_(False)
        for parameter in level_parameters(model).values():
            parameter.requires_grad_(True)


def describe_base(config: Any, num_levels: int) -> dict[str, Any]:
    """The field ``loglinear_levels`` of a lifted model's config: its levels, and the name and revision of its base."""
    known = {"base": config.name_or_path, "revision": getattr(config, "_commit_hash", None)}
    return {"num_levels": num_levels, **{name: value for name, value in known.items() if value}}


def num_levels(scales: dict[str, LevelScale]) -> int:
    """Levels with a λ of their own, in the layer that has most."""
    return max(module.L.shape[1] for module in scales.values())
