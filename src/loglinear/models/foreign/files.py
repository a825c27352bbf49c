"""FILES: the safetensors of a checkpoint in a folder or on the hub, whole or in shards, read one tensor at a time."""

from __future__ import annotations

import json
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def find_file(checkpoint: str | PathLike[str], name: str, **hub: Any) -> Path | None:
    """The file ``name`` of a checkpoint; None if it has none. hub: ``subfolder``, ``revision``, ``token``, ..."""
    found = cached_file(str(checkpoint), name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else Path(found)


class TensorFiles:
    """The tensors of a checkpoint by name. Use it in a ``with`` block. Nothing is read before ``read``.

    Args:
        checkpoint: a folder, or a name on the hub. hub: as in ``find_file``.

    Raises:
        FileNotFoundError: there are no safetensors, or a shard that the index names is not there.
    """

    def __init__(self, checkpoint: str | Path, **hub: Any) -> None:
        self.checkpoint = checkpoint
        self._stack = ExitStack()
        self._file: dict[str, Any] = {}  # by tensor
        for path in _paths(checkpoint, hub):
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():  # noqa: SIM118 - no dict
                if name in self._file:
                    raise ValueError(f"{checkpoint} holds the tensor {name} twice, the second time in {path.name}")
                self._file[name] = file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        return tuple(self._file[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, by reading none of its rows."""
        return self._file[name].get_slice(name)[:0].dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a tensor, on the CPU, in the file's dtype."""
        if start == 0 and stop is None:
            return self._file[name].get_tensor(name)
        return self._file[name].get_slice(name)[start:stop]


def _paths(checkpoint: str | Path, hub: dict[str, Any]) -> list[Path]:
    """The file of all weights, or its shards."""
    whole = find_file(checkpoint, WEIGHTS, **hub)
    if whole is not None:
        return [whole]
    index = find_file(checkpoint, INDEX, **hub)
    if index is None:
        raise FileNotFoundError(
            f"{checkpoint} holds no {WEIGHTS} and no {INDEX}: weights are read from safetensors only"
        )
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = {name: find_file(checkpoint, name, **hub) for name in shards}
    if lacking := [name for name, path in found.items() if path is None]:
        raise FileNotFoundError(f"{checkpoint} lacks {', '.join(lacking)}, which {INDEX} names")
    return [path for path in found.values() if path is not None]
