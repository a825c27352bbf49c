"""The figure of accuracy against pairs: a panel for each width and length, a curve for each model and state size."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from loglinear.tasks.mqar.config import MODELS
from loglinear.tasks.mqar.report import Result


def draw_accuracy(found: list[Result], path: Path) -> None:
    """Save a PNG; bars are one standard deviation over seeds. A colour is a family, a dashed line its linear model."""
    widths = sorted({result.width for result in found})
    lengths = sorted({result.length for result in found})
    state_sizes = sorted({result.state_size for result in found})
    families = list(dict.fromkeys(name.removeprefix("Log-Linear ") for name in MODELS))
    figure = Figure(figsize=(1.5 + 3.5 * len(widths), 1 + 3 * len(lengths)), layout="constrained")
    panels = figure.subplots(len(lengths), len(widths), sharex="row", sharey=True, squeeze=False)
    for result in found:
        panel = panels[lengths.index(result.length)][widths.index(result.width)]
        counts = [pairs for pairs in result.accuracy if pairs != "mean"]
        family = families.index(result.model.removeprefix("Log-Linear "))
        with_state = len(state_sizes) > 1 and result.state_floats is not None
        panel.errorbar(
            [int(pairs) for pairs in counts],
            [result.accuracy[pairs][0] for pairs in counts],
            [result.accuracy[pairs][1] for pairs in counts],
            label=f"{result.model}, K {result.state_size}" if with_state else result.model,
            color=f"C{family}",
            linestyle="-" if result.model.startswith("Log-Linear") else "--",
            marker="os^vDPX"[state_sizes.index(result.state_size) % 7],
            capsize=2,
        )
        panel.set_xscale("log", base=2)
        panel.set_title(f"width {result.width}, length {result.length}", fontsize=10)
    for panel in panels[-1]:
        panel.set_xlabel("pairs")
    for row in panels:
        row[0].set_ylabel("accuracy")
        row[0].set_ylim(-0.02, 1.02)
    panels[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=150)
