"""CONVERSION: a checkpoint of another library written as one of ours, tensor by tensor.

Memory holds one file of the result at a time. Every tensor keeps its dtype. config.json is written last: a folder without it
holds no model.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from loglinear.models.configuration import LogLinearConfig
from loglinear.models.foreign.files import INDEX, WEIGHTS, TensorFiles, find_file
from loglinear.models.foreign.loading import ForeignWeights, open_weights
from loglinear.models.foreign.options import TRANSLATIONS, is_foreign

# Files beside the weights that mean the same in both libraries.
KEPT = (
    *(
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ),
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json"),
)


@dataclass(frozen=True)
class ConversionReport:
    """A report on what ``convert`` has written.

    Attributes:
        kind: ``model_type`` of the original. mixer: of the result. tensors, parameters: how many the result has.
        files: their names, weights first.
    """

    kind: str
    mixer: str
    tensors: int
    parameters: int
    files: list[str]

    def __str__(self) -> str:
        return f"{self.kind} as {self.mixer}: {self.parameters:,} parameters in {self.tensors} tensors; {', '.join(self.files)}"


def convert(
    checkpoint: str | Path, output: str | Path, max_shard_bytes: int = 5 * 10**9, **hub: Any
) -> ConversionReport:
    """Write the checkpoint of another library as one of ours, with its tokenizer and its generation settings.

    Args:
        checkpoint: a folder with config.json and safetensors, or a name on the hub. output: the folder to write; it must not
            hold a model. max_shard_bytes: largest file of weights, and so the memory that the conversion takes.
        hub: ``subfolder``, ``revision``, ``token``, ``cache_dir``, ``local_files_only``, as transformers has them.

    Raises:
        ValueError: no layout of another library, an option that our models lack, or tensors that do not fit: missing,
            surplus, or of another shape; the message lists them. FileNotFoundError: there are no safetensors.
        FileExistsError: output holds a model.
    """
    output = Path(output)
    if (output / "config.json").exists():
        raise FileExistsError(f"output: {output} holds a model; choose another folder")
    given, _ = PreTrainedConfig.get_config_dict(str(checkpoint), **hub)
    if not is_foreign(given):
        raise ValueError(
            f"checkpoint must be of a model_type in {sorted(TRANSLATIONS)}: got {given.get('model_type')!r} in {checkpoint}"
        )
    kind, config = given["model_type"], LogLinearConfig.from_dict(given)
    output.mkdir(parents=True, exist_ok=True)
    with TensorFiles(checkpoint, **hub) as files:
        weights = open_weights(files, kind, config)
        config.dtype = config.dtype or weights.dtype("model.embed_tokens.weight")
        written = _write_weights(weights, output, max_shard_bytes)
    for name in KEPT:
        found = find_file(checkpoint, name, **hub)
        if found is not None:
            shutil.copyfile(found, output / name)
            written.append(name)
    config.save_pretrained(output)
    sizes = [_count(shape) for shape in weights.shapes.values()]
    mixer = config.mixer if isinstance(config.mixer, str) else ", ".join(sorted(set(config.mixer)))
    return ConversionReport(kind, mixer, len(sizes), sum(sizes), [*written, "config.json"])


def _write_weights(weights: ForeignWeights, output: Path, limit: int) -> list[str]:
    """Write the weights in as few files as hold at most ``limit`` bytes each, and return the names of the files."""
    shards, sizes = [list[str]()], [0]
    for name, shape in weights.shapes.items():
        size = _count(shape) * weights.dtype(name).itemsize
        if shards[-1] and sizes[-1] + size > limit:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    stem, suffix = WEIGHTS.split(".")
    names = [f"{stem}-{i:05}-of-{len(shards):05}.{suffix}" for i in range(1, len(shards) + 1)]
    names = [WEIGHTS] if len(shards) == 1 else names
    for file, shard in zip(names, shards):
        tensors: dict[str, Tensor] = {name: weights.read(name).contiguous() for name in shard}
        save_file(tensors, output / file, metadata={"format": "pt"})
        del tensors
    if len(shards) == 1:
        return names
    places = {name: file for file, shard in zip(names, shards) for name in shard}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
    (output / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return [*names, INDEX]


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
