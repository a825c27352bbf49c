"""The figure of needle in a haystack: share of exact answers over length and depth, a panel for each model and kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loglinear.tasks.style import canvas, heat, save, styled, tokens


@styled
def draw_heatmaps(results: dict[str, Sequence[dict]], path: Path, tuned_context: int | None = None) -> list[Path]:
    """Save the ``table`` of each model as PNG and SVG. A line stands behind the longest length seen in fine-tuning.

    A single result may have an empty name: a name stands at each panel only where there are several.
    """
    kinds = list(dict.fromkeys(row["kind"] for rows in results.values() for row in rows))
    title = _title(results, tuned_context)
    figure, panels = canvas(title, (len(results), len(kinds)), (2.9, 2.0), left=0.8, gaps=(0.3, 0.8))
    for line, (name, rows) in zip(panels, results.items()):
        for panel, kind in zip(line, kinds):
            _draw(panel, [row for row in rows if row["kind"] == kind], tuned_context)
            panel.set_title(f"{name}: {kind}" if len(results) > 1 else kind)
            panel.tick_params(length=0, labelleft=panel is line[0])
        line[0].set_ylabel("depth of the needle")
    for panel in panels[-1]:
        panel.set_xlabel("length in tokens" + "; line: fine-tuned to it" * (tuned_context is not None))
    return save(figure, path)


def _title(results: dict[str, Sequence[dict]], tuned_context: int | None) -> str:
    """The message of all cells: percent of exact answers, up to the longest length of the fine-tune and beyond it."""
    rows = [row for group in results.values() for row in group]
    near = [row["exact"] for row in rows if tuned_context is None or row["context"] <= tuned_context]
    far = [row["exact"] for row in rows if tuned_context is not None and row["context"] > tuned_context]
    (name, *others) = results
    text = f"{name}: " if name and not others else ""
    if not near or not far:
        return f"{text}{100 * np.mean(near or far):.0f}% of needles are found exactly (numbers in percent)"
    where = f"up to {tokens(tuned_context or 0)}, the longest length of the fine-tune"
    return f"{text}{100 * np.mean(near):.0f}% of needles are found {where}, {100 * np.mean(far):.0f}% beyond it"


def _draw(panel, rows: Sequence[dict], tuned_context: int | None) -> None:
    contexts = sorted({row["context"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    values = np.full((len(depths), len(contexts)), np.nan)
    for row in rows:
        values[depths.index(row["depth"]), contexts.index(row["context"])] = row["exact"]
    colors, ink = heat()
    panel.imshow(values, cmap=colors, vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        panel.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=ink(value))
    panel.set_xticks(range(len(contexts)), [tokens(context) for context in contexts])
    panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    panel.spines[:].set_visible(False)
    if tuned_context is not None and contexts and contexts[0] <= tuned_context < contexts[-1]:
        edge = sum(context <= tuned_context for context in contexts) - 0.5
        panel.axvline(edge, color="#e07b1a", linewidth=2)
