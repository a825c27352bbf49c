"""``loglinear masks``: draw the masks of six sequence models side by side, and the buckets that one token sees.

The committed figures of the docs are its output with the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class MasksArgs:
    """Draw the masks M of ``O = (A ∘ M) V`` side by side (masks.*) and the buckets of one token (buckets.*)."""

    output: Path = Path("out/masks")
    """Folder for the figures; each is written as PNG and as SVG."""
    tokens: int = 32
    """Tokens in the masks, 2 to 256."""
    query: int = 13
    """Token whose buckets are drawn, among 16: 1 to 15."""
    seed: int = 0
    """Seed of the gates, filter and level scales in the picture."""

    def __post_init__(self) -> None:
        if not 2 <= self.tokens <= 256:
            raise ValueError(f"tokens must be 2 to 256: got {self.tokens}")
        if not 1 <= self.query <= 15:
            raise ValueError(f"query must be 1 to 15: got {self.query}")


def masks(args: MasksArgs) -> list[Path]:
    """Write ``masks.{png,svg}`` and ``buckets.{png,svg}`` under ``args.output``, print and return their paths."""
    from loglinear.cli.masks_figure import draw_buckets, draw_masks
    from loglinear.tasks.style import save

    figures = {"masks": draw_masks(args.tokens, args.seed), "buckets": draw_buckets(args.query)}
    written = [path for name, figure in figures.items() for path in save(figure, args.output / name)]
    for path in written:
        print(path)
    return written
