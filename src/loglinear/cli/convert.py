"""``loglinear convert``: a checkpoint of another library becomes one of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class ConvertArgs:
    """Write a checkpoint of another library as one of ours: the paper's own, or one of flash-linear-attention."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Folder with config.json and safetensors, or a name on the hub."""
    output: Path
    """Folder to write; it must not hold a model."""
    subfolder: str = ""
    """Folder inside the checkpoint, such as gdn."""
    revision: str = "main"
    """Branch, tag or commit on the hub."""
    max_shard_gb: float = 5.0
    """Largest file of weights in GB (10^9 bytes), which is about the memory that the conversion takes."""

    def __post_init__(self) -> None:
        if not self.max_shard_gb > 0:
            raise ValueError(f"max_shard_gb must be above 0: got {self.max_shard_gb}")


def convert(args: ConvertArgs) -> None:
    """Write ``args.output`` and print what it holds."""
    from loglinear.models import convert as write

    print(
        write(
            args.checkpoint,
            args.output,
            int(args.max_shard_gb * 10**9),
            subfolder=args.subfolder,
            revision=args.revision,
        )
    )
