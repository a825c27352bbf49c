"""LOADING: a checkpoint of another library as weights of ours. Every tensor is used, and none is missing.

Tensors are read and joined one at a time. Beside the weights themselves memory holds one tensor of the other library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from loglinear.models.foreign.files import TensorFiles, find_file
from loglinear.models.foreign.options import LINEAR, is_foreign
from loglinear.models.foreign.tensors import Recipes, Shapes, recipes

if TYPE_CHECKING:
    from loglinear.models.configuration import LogLinearConfig

# Arguments of ``from_pretrained`` that say where files are.
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
HEAD = "lm_head.weight"


def shapes_of(config: LogLinearConfig) -> Shapes:
    """Shapes of all tensors of a causal language model that a checkpoint of ours holds."""
    from loglinear.models.causal import LogLinearForCausalLM

    with torch.device("meta"):
        model = LogLinearForCausalLM(config)
    tied = set(model._tied_weights_keys) if config.tie_word_embeddings else set()
    return {name: tuple(x.shape) for name, x in model.state_dict().items() if name not in tied}


@dataclass
class ForeignWeights:
    """The tensors of a checkpoint as ours: files that are open, the recipe of each of our tensors, and its shape.

    Raises ValueError if tensors are missing, surplus or of another shape; the message lists them.
    """

    files: TensorFiles
    recipes: Recipes
    shapes: Shapes

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.recipes:
            yield name, self.read(name)

    def read(self, name: str) -> Tensor:
        """One of our tensors, on the CPU, in the dtype of its file."""
        parts = [self.files.read(piece.name, piece.start, piece.stop) for piece in self.recipes[name]]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined.reshape(self.shapes[name])  # of a convolution: without its middle dimension

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that ``read`` gives."""
        found = [self.files.dtype(piece.name) for piece in self.recipes[name]]
        for other in found[1:]:
            found[0] = torch.promote_types(found[0], other)
        return found[0]


def open_weights(files: TensorFiles, kind: str, config: LogLinearConfig) -> ForeignWeights:
    """The weights of a model of ``config`` in ``files``, which are of the layout ``kind`` (a ``model_type``).

    λ may be absent where the layout is that of a linear model.
    """
    ours = shapes_of(config)
    if kind in LINEAR:
        ours = {name: shape for name, shape in ours.items() if ".level_scale." not in name}
    plan = recipes(config, ours, files.names())
    wanted = {piece.name for pieces in plan.values() for piece in pieces}
    copied = {HEAD} & files.names() if config.tie_word_embeddings else set()
    _check_names(files, kind, wanted | copied)
    _check_shapes(files, kind, plan, ours)
    weights = ForeignWeights(files, plan, ours)
    if copied and not torch.equal(files.read(HEAD), weights.read("model.embed_tokens.weight")):
        raise ValueError(
            f"{files.checkpoint} must hold one matrix as {HEAD} and embeddings (tie_word_embeddings): got two"
        )
    return weights


def from_foreign(load: Callable[..., Any], pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
    """A model with the weights of a checkpoint of another library, and transformers' report; None for any other checkpoint.

    Args:
        load: the ``from_pretrained`` of transformers for the model's class. The others: its arguments.
    """
    checkpoint, hub = pretrained_model_name_or_path, {name: kwargs[name] for name in HUB if name in kwargs}
    given = {} if checkpoint is None else _config_of(checkpoint, hub)
    if not is_foreign(given):
        return None
    if kwargs.get("variant") is not None:
        raise ValueError(f"variant must be None for a checkpoint of another library: got {kwargs['variant']!r}")
    from loglinear.models.configuration import LogLinearConfig

    kwargs = {name: value for name, value in kwargs.items() if name not in HUB}
    config = kwargs.pop("config", None)
    if not isinstance(config, LogLinearConfig):
        config, kwargs = LogLinearConfig.from_pretrained(
            checkpoint if config is None else config, return_unused_kwargs=True, **hub, **kwargs
        )
    with TensorFiles(checkpoint, **hub) as files:
        state = dict(open_weights(files, given["model_type"], config))
        loaded = load(None, *args, config=config, state_dict=state, output_loading_info=True, **kwargs)
    model = loaded[0]
    model.config._name_or_path = model.name_or_path = str(checkpoint)
    if model.can_generate() and find_file(checkpoint, "generation_config.json", **hub) is not None:
        model.generation_config = GenerationConfig.from_pretrained(checkpoint, **hub)
    return loaded


def _config_of(checkpoint: str | PathLike[str], hub: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json; empty if none is found, which transformers is then left to report."""
    quiet = ("_raise_exceptions_for_gated_repo", "_raise_exceptions_for_connection_errors")
    try:
        found = find_file(checkpoint, "config.json", **hub, **dict.fromkeys(quiet, False))
    except OSError:
        return {}
    return {} if found is None else json.loads(found.read_text(encoding="utf-8"))


def _check_names(files: TensorFiles, kind: str, wanted: set[str]) -> None:
    """Raise ValueError unless the files hold the wanted tensors and no other."""
    have = files.names()
    missing, surplus = sorted(wanted - have), sorted(have - wanted)
    found = []
    if missing:
        found.append(f"{len(missing)} missing: {', '.join(missing)}")
    if surplus:
        found.append(f"{len(surplus)} surplus: {', '.join(surplus)}")
    if found:
        raise ValueError(
            f"{files.checkpoint} does not hold the tensors of its config.json ({kind}); {'; '.join(found)}"
        )


def _check_shapes(files: TensorFiles, kind: str, plan: Recipes, ours: Shapes) -> None:
    """Raise ValueError unless every tensor is made up of whole tensors of the right shapes."""
    wrong = []
    for name, pieces in plan.items():
        shapes = [files.shape(piece.name) for piece in pieces]
        rows = [len(range(shape[0])[piece.start : piece.stop]) for piece, shape in zip(pieces, shapes)]
        rest = {shape[2:] if len(shape) == 3 and shape[1] == 1 else shape[1:] for shape in shapes}
        if sum(rows) != ours[name][0] or rest != {ours[name][1:]}:
            theirs = ", ".join(f"{piece.name} {list(shape)}" for piece, shape in zip(pieces, shapes))
            wrong.append(f"{name} {list(ours[name])} from {theirs}")
    if wrong:
        raise ValueError(
            f"{files.checkpoint} holds tensors of other shapes than its config.json ({kind}): {'; '.join(wrong)}"
        )
