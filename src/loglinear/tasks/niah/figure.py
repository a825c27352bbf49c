"""The figure of needle in a haystack: share of exact answers over length and depth, a panel for each model and kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def draw_heatmaps(results: dict[str, Sequence[dict]], path: Path, tuned_context: int | None = None) -> None:
    """Save a PNG from the ``table`` of each model. A line stands behind the longest length seen in fine-tuning."""
    kinds = list(dict.fromkeys(row["kind"] for rows in results.values() for row in rows))
    size = (1.5 + 3.4 * len(kinds), 0.8 + 3.0 * len(results))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(results), len(kinds), squeeze=False)
    for line, (name, rows) in zip(panels, results.items()):
        for panel, kind in zip(line, kinds):
            image = _draw(panel, [row for row in rows if row["kind"] == kind], tuned_context)
            panel.set_title(f"{name}: {kind}" if len(results) > 1 else kind, fontsize=10)
        line[0].set_ylabel("depth of the needle")
    for panel in panels[-1]:
        panel.set_xlabel("length (tokens)")
    figure.colorbar(image, ax=panels, label="share of exact answers", shrink=0.8)
    figure.savefig(path, dpi=150)


def _draw(panel, rows: Sequence[dict], tuned_context: int | None):
    contexts = sorted({row["context"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    values = np.full((len(depths), len(contexts)), np.nan)
    for row in rows:
        values[depths.index(row["depth"]), contexts.index(row["context"])] = row["exact"]
    image = panel.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        panel.text(
            j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color="black" if value > 0.5 else "white"
        )
    panel.set_xticks(range(len(contexts)), [tokens(context) for context in contexts])
    panel.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
    if tuned_context is not None and contexts and contexts[0] <= tuned_context < contexts[-1]:
        panel.axvline(sum(context <= tuned_context for context in contexts) - 0.5, color="red", linewidth=1.5)
    return image


def tokens(count: int) -> str:
    """16384 as 16K, 1000 as 1000."""
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)
