"""The figure of accuracy against pairs: a panel for each width and length, a curve for each model and state size."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from loglinear.tasks.mqar.report import Result

APART = 0.12  # octaves between two models at one number of pairs, so that neither hides the other


def draw_accuracy(found: list[Result], path: Path) -> None:
    """Save a PNG. Models differ in colour alone: a dot for each seed, a line and bars for mean and standard deviation."""
    widths = sorted({result.width for result in found})
    lengths = sorted({result.length for result in found})
    labels = list(dict.fromkeys(result.label for result in found))
    figure = Figure(figsize=(1.5 + 3.5 * len(widths), 1 + 3 * len(lengths)), layout="constrained")
    panels = figure.subplots(len(lengths), len(widths), sharex="row", sharey=True, squeeze=False)
    for result in found:
        panel = panels[lengths.index(result.length)][widths.index(result.width)]
        number = labels.index(result.label)
        counts = [pairs for pairs in result.accuracy if pairs != "mean"]
        places = [int(pairs) * 2 ** (APART * (number - (len(labels) - 1) / 2)) for pairs in counts]
        means, deviations = zip(*(result.accuracy[pairs] for pairs in counts))
        bars = {"label": result.label, "color": f"C{number}", "linewidth": 1, "capsize": 3, "markersize": 5}
        panel.errorbar(places, means, deviations, marker="D", **bars)
        for shares in result.by_seed.values():
            panel.plot(places, [shares[pairs] for pairs in counts], ".", color=f"C{number}", alpha=0.4, markersize=5)
        panel.set_xscale("log", base=2)
        panel.set_xticks([int(pairs) for pairs in counts], counts)
        panel.minorticks_off()
        panel.margins(x=0.1)
        panel.set_title(f"width {result.width}, length {result.length}", fontsize=10)
    for panel in panels[-1]:
        panel.set_xlabel("pairs")
    for row in panels:
        row[0].set_ylabel("share of values recalled")
        row[0].set_ylim(-0.02, 1.02)
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
