"""LEVELS FILE: the parameters that a lift adds, saved alone and put on a base model again."""

from __future__ import annotations

import hashlib
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from loglinear.layers.level_scale import OFFSETS
from loglinear.models.levels import (
    FIELD,
    Trained,
    check_trained,
    describe_base,
    level_parameters,
    level_scales,
    num_levels,
    train_only,
)
from loglinear.models.lift import LiftReport, lift

LEVELS_FILE = "levels.safetensors"
FORMAT = "1"
PROBED = 1024  # first elements of every parameter that tell one base from another


def save_levels(model: PreTrainedModel, path: str | Path) -> None:
    """Save the levels of a lifted model alone: a safetensors file of a few MB for a model of any size.

    The metadata names the base model and its revision, the model type, the number of levels and the version of the format.
    Only a model whose other parameters are those of its base comes back from this file (``lift(model, train="levels")``).

    Args:
        model: a lifted model. Adapters on it must be merged or taken off first.
        path: the file to write; its folder must exist.

    Raises:
        ValueError: the model has no log-linear layer, or λ of one starts elsewhere than a lift's.
    """
    scales, config = level_scales(model), model.config
    if not scales:
        raise ValueError("model must have been lifted: got one without log-linear layers")
    wrong = [name for name, module in scales.items() if module.offset != OFFSETS["one"]]
    if wrong:
        raise ValueError(f"model must have λ that start at 1, as a lift makes them: {wrong[0]} does not")
    described = getattr(config, FIELD, None) or describe_base(config, num_levels(scales))
    metadata = {name: str(described[name]) for name in ("base", "revision") if name in described}
    metadata |= {
        "format": "pt",
        FIELD: FORMAT,
        "model_type": config.model_type,
        "num_levels": str(num_levels(scales)),
        "base_hash": base_hash(model),
    }
    tensors = {name: x.detach().cpu().contiguous() for name, x in level_parameters(model).items()}
    save_file(tensors, path, metadata)


def load_levels(model: PreTrainedModel, path: str | Path, train: Trained = "all", any_base: bool = False) -> LiftReport:
    """Put saved levels on their base model again: lift the model, in place, unless it is lifted, and load the file.

    Args:
        model: the base model of the file, as it was loaded or lifted.
        path: what ``save_levels`` wrote. Tensors take the dtype and the device of the model.
        train: what an optimizer may change then, as in ``lift``.
        any_base: whether to take another base of the same shapes too, as a quantised or a fine-tuned one.

    Returns:
        the ``LiftReport`` of the lift.

    Raises:
        ValueError: the file holds no levels, or those of another base: another model type, other layers, shapes or weights.
            The model is then as it was.
    """
    check_trained(train)
    tensors, metadata = _read(path)
    kind, levels = metadata["model_type"], int(metadata["num_levels"])
    if kind != model.config.model_type:
        raise ValueError(f"path must hold levels for a model of type {model.config.model_type!r}: {path} has {kind!r}")
    lifted = bool(level_scales(model))
    _check_shapes(tensors, level_parameters(model if lifted else _lifted_twin(model, levels)), path)
    if not any_base and base_hash(model) != metadata["base_hash"]:
        saved, own = (_name(described) for described in (metadata, describe_base(model.config, levels)))
        raise ValueError(
            f"model must be the base of {path}, with its weights: the levels were saved on {saved}, and this is {own}, with "
            "other weights (any_base=True puts them on nevertheless)"
        )
    report = LiftReport(before=model.num_parameters()) if lifted else lift(model, levels)
    with torch.no_grad():
        for name, parameter in level_parameters(model).items():
            parameter.copy_(tensors[name])
    train_only(model, train)
    return report


@torch.no_grad()
def base_hash(model: nn.Module) -> str:
    """Identity of all parameters but the levels: of their names and first elements, the same in 32 bits and in bfloat16."""
    digest, own = hashlib.blake2b(digest_size=16), level_parameters(model)
    for name, parameter in sorted(model.named_parameters()):
        if name not in own:
            probe = parameter.detach().flatten()[:PROBED].to("cpu", torch.bfloat16)
            digest.update(name.encode() + probe.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _name(described: dict[str, Any]) -> str:
    return (
        " at ".join(described[name] for name in ("base", "revision") if name in described) or "a model without a name"
    )


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except SafetensorError as error:
        raise ValueError(f"path must be a file of save_levels: {path} cannot be read: {error}") from error
    if metadata.get(FIELD) != FORMAT:
        found = f"version {metadata[FIELD]}" if FIELD in metadata else "none"
        raise ValueError(f"path must be a file of save_levels in version {FORMAT} of its format: {path} is of {found}")
    return tensors, metadata


def _lifted_twin(model: PreTrainedModel, levels: int) -> PreTrainedModel:
    """The model as a lift would make it, without memory for its parameters."""
    with torch.device("meta"):
        twin = type(model)(deepcopy(model.config))
    lift(twin, levels)
    return twin


def _check_shapes(tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], path: str | Path) -> None:
    problems = {
        "missing in the file": sorted(parameters.keys() - tensors.keys()),
        "not in the model": sorted(tensors.keys() - parameters.keys()),
        "of another shape": [
            f"{name} {list(tensors[name].shape)}, needed {list(x.shape)}"
            for name, x in parameters.items()
            if name in tensors and tensors[name].shape != x.shape
        ],
    }
    told = [
        f"{len(names)} {what} ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})"
        for what, names in problems.items()
        if names
    ]
    if told:
        raise ValueError(f"path must hold the levels of this model: {path} is of another base: {'; '.join(told)}")
