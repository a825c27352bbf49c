"""The figure of accuracy against pairs: a panel for each width and length, a curve for each model and state size."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from loglinear.tasks.mqar.report import Result
from loglinear.tasks.style import canvas, colors_of, label_ends, save, styled

APART = 0.12  # octaves between two models at one number of pairs, so that neither hides the other


@styled
def draw_accuracy(found: list[Result], path: Path, title: str | None = None) -> list[Path]:
    """Save PNG and SVG. Models differ in colour alone: a dot for each seed, a line and bars for mean and standard deviation.

    ``title``: the figure's message; none: which model recalls most.
    """
    widths = sorted({result.width for result in found})
    lengths = sorted({result.length for result in found})
    colors = colors_of(_label(result, found) for result in found)
    labels = list(colors)
    panels = canvas(title or _title(found), (len(lengths), len(widths)), (3.1, 2.2), right=2.2, gaps=(0.3, 0.75))
    for result in found:
        panel = panels[1][lengths.index(result.length)][widths.index(result.width)]
        label = _label(result, found)
        counts = [pairs for pairs in result.accuracy if pairs != "mean"]
        offset = 2 ** (APART * (labels.index(label) - (len(labels) - 1) / 2))
        places = [int(pairs) * offset for pairs in counts]
        means, deviations = zip(*(result.accuracy[pairs] for pairs in counts))
        bars = {"label": label, "color": colors[label], "linewidth": 1.2, "capsize": 2}
        panel.errorbar(places, means, deviations, marker="D", **bars)
        for shares in result.by_seed.values():
            panel.plot(places, [shares[pairs] for pairs in counts], ".", color=colors[label], alpha=0.4)
        panel.set_xscale("log", base=2)
        panel.set_xticks([int(pairs) for pairs in counts], counts)
        panel.minorticks_off()
        panel.margins(x=0.08)
        panel.set_ylim(-0.02, 1.02)
        panel.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
        panel.tick_params(labelleft=result.width == widths[0])
        panel.set_title(f"width {result.width}, {result.length} tokens")
    for panel in panels[1][-1]:
        panel.set_xlabel("key-value pairs")
    for row in panels[1]:
        row[0].set_ylabel("values recalled")
        curves = [container.lines[0] for container in row[-1].containers]
        label_ends(row[-1], [(curve.get_ydata()[-1], container.get_label(), curve.get_color())
                             for curve, container in zip(curves, row[-1].containers)])  # fmt: skip
    return save(panels[0], path)


def _label(result: Result, found: list[Result]) -> str:
    """The model's name, with the width of its keys if some model has several."""
    several = len({(r.model, r.state_size) for r in found}) > len({r.model for r in found})
    return result.label if several or len({r.state_size for r in found if r.state_floats}) > 1 else result.model


def _title(found: list[Result]) -> str:
    """The label with the most values recalled, where all labels have the same sizes."""
    sizes: dict[str, set[tuple[int, int]]] = {}
    shares: dict[str, list[float]] = {}
    for result in found:
        label = _label(result, found)
        sizes.setdefault(label, set()).add((result.width, result.length))
        shares.setdefault(label, []).append(result.accuracy["mean"][0])
    if len(shares) < 2 or any(size != sizes[_label(found[0], found)] for size in sizes.values()):
        return "Associative recall: share of values recalled, by number of pairs"
    best, second = sorted(shares, key=lambda label: -fmean(shares[label]))[:2]
    numbers = f"{fmean(shares[best]):.0%} of all values, {second} {fmean(shares[second]):.0%}"
    return f"Associative recall: {best} recalls the most, {numbers}"
