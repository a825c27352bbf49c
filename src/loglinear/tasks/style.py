"""One style for all figures: names and colours of models, ticks in plain numbers, labels at the lines, SVG and PNG.

The background is transparent. Text is a grey that can be read on white and on a dark page (contrast 4.3 on both), and every
colour has a contrast of 3 or more on both. Margins are fixed in inches, so labels can be placed before anything is drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from loglinear.tasks.mqar.config import MODELS

INK = "#737b86"  # text
FAINT = "#8a929c"  # axes and reference lines
# A family has one hue, and its log-linear model is darker. The colours differ with every kind of colour blindness.
COLORS = {
    "Log-Linear Mamba-2": "#1a6fd8",
    "Mamba-2": "#4a9ae0",
    "Log-Linear Gated DeltaNet": "#c24a00",
    "Gated DeltaNet": "#e07b1a",
    "Transformer": "#00936b",
}
SPARE = ("#a349a4", "#8a7a00", "#b0456b", *COLORS.values())  # for other names
HEAT = ("#eef3f8", "#9cc3e6", "#4a9ae0", "#1a6fd8", "#0a3d80")  # from none to all
NAMES = {mixer: name for name, mixer in MODELS.items()}
TITLE, LABEL = 0.24, 0.17  # inches of a line of the title, and between two labels
SETTINGS: dict[Any, Any] = {
    **{"font.family": "DejaVu Sans", "font.size": 9.5, "mathtext.fontset": "dejavusans"},
    **{"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left"},
    **{"axes.linewidth": 0.8, "lines.linewidth": 1.8, "lines.markersize": 4, "axes.unicode_minus": True},
    **{"axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "xtick.minor.size": 0},
    **{"ytick.minor.size": 0, "svg.fonttype": "path", "svg.hashsalt": "loglinear"},
}
styled = matplotlib.rc_context(SETTINGS)  # decorates functions (no generators): artists take their settings when made


def canvas(
    title: str,
    panels: tuple[int, int] = (1, 1),
    size: tuple[float, float] = (4.6, 3.0),
    left: float = 0.8,
    right: float = 0.3,
    gaps: tuple[float, float] = (0.75, 0.75),
    bottom: float = 0.55,
    note: str = "",
) -> tuple[Figure, np.ndarray]:
    """A figure and its ``[rows, columns]`` of panels, each of ``size``; margins and gaps (across, down) are in inches.

    The title is one sentence and is broken into as many lines as it needs. ``note``: small print at the bottom.
    """
    rows, columns = panels
    width = left + columns * size[0] + (columns - 1) * gaps[0] + right
    for name in COLORS:  # a name is not broken into lines
        title = title.replace(name, name.replace(" ", "\u00a0"))
    lines = textwrap.wrap(title, int(9.6 * width), break_on_hyphens=False)  # characters of a bold line
    top = 0.2 + TITLE * len(lines) + 0.25
    bottom += 0.25 if note else 0.0
    height = top + rows * size[1] + (rows - 1) * gaps[1] + bottom
    figure = Figure(figsize=(width, height))
    figure.text(0.12 / width, 1 - 0.14 / height, "\n".join(lines), va="top", fontsize=12, fontweight="bold")
    figure.text(0.12 / width, 0.1 / height, note, va="bottom", fontsize=8)
    made = np.empty((rows, columns), dtype=object)
    for row in range(rows):
        for column in range(columns):
            x, y = left + column * (size[0] + gaps[0]), height - top - size[1] - row * (size[1] + gaps[1])
            made[row, column] = figure.add_axes((x / width, y / height, size[0] / width, size[1] / height))
    return figure, made


@styled
def save(figure: Figure, path: Path) -> list[Path]:
    """Write ``path`` as ``.png`` and as ``.svg`` and return both. No date: the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_suffix(".png"), path.with_suffix(".svg")]
    figure.savefig(written[0], dpi=150)
    figure.savefig(written[1], metadata={"Date": None})
    return written


def name_of(model: str) -> str:
    """The name that people write: Log-Linear Mamba-2 for log_linear_mamba2. Other names stay as they are."""
    return NAMES.get(model, model)


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name. ``Mamba-2, K 144`` has the colour of Mamba-2. Other names have the first colours not taken."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        known = COLORS.get(name_of(name.split(",")[0]))
        found[name] = known if known and known not in found.values() else ""
    for name, color in found.items():
        free = [spare for spare in SPARE if spare not in found.values()]
        found[name] = color or (free or SPARE)[0]
    return found


def tokens(count: int) -> str:
    """16384 as 16K, 1048576 as 1M, 1000 as 1000."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if count and count % unit == 0:
            return f"{count // unit}{letter}"
    return str(count)


def plain(value: float) -> str:
    """A number as people write it: 0.5, 20, 80K, 1.5M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def signed(value: float, digits: int = 3) -> str:
    """+0.050 or −0.050."""
    return f"{value:+.{digits}f}".replace("-", "−")


def in_bytes(count: float) -> str:
    """Bytes as 512 B, 88 MiB, 1.5 GiB, with two digits or more."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            digits = f"{count / unit:.1f}".removesuffix(".0") if count < 10 * unit else f"{count / unit:,.0f}"
            return f"{digits} {name}"
    return f"{count:g} B"


def token_axis(panel, counts: Sequence[int], few: int = 6) -> None:
    """A logarithmic x axis with at most ``few`` ticks, at some of ``counts``, the last among them."""
    counts = sorted({*counts})
    step = -(-len(counts) // few)
    shown = counts[::-1][::step][::-1]
    panel.set_xscale("log", base=2)
    panel.set_xticks(shown, [tokens(count) for count in shown])
    panel.minorticks_off()


def plain_axis(axis, ticks: Sequence[float], write=plain) -> None:
    """These ticks and no others, written by ``write``."""
    axis.set_ticks(list(ticks), [write(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def decades(values: Sequence[float]) -> list[float]:
    """1, 3, 10, 30 and so on, over the range of ``values``."""
    low, high = int(np.floor(np.log10(min(values)))), int(np.ceil(np.log10(max(values))))
    ticks = [factor * 10.0**power for power in range(low, high + 1) for factor in (1, 3)]
    return [tick for tick in ticks if min(values) / 2 <= tick <= 2 * max(values)]


def byte_ticks(values: Sequence[float]) -> list[float]:
    """Up to six powers of two, evenly spread, over the range of ``values``."""
    low, high = int(np.floor(np.log2(min(values)))), int(np.ceil(np.log2(max(values))))
    return [2.0**power for power in range(low, high + 1, max(1, -(-(high - low) // 5)))]


def label_ends(panel, ends: Sequence[tuple[float, str, str]], line: float = LABEL) -> None:
    """Text right of the panel at (y, text, colour) of each, moved apart where two would overlap.

    The limits of the panel are fixed first. An end above or below them is marked by an arrow.
    """
    panel.set_ylim(panel.get_ylim())
    height = panel.get_figure().get_size_inches()[1] * panel.get_position().height
    to_axes = panel.transData + panel.transAxes.inverted()
    wanted = []
    for y, text, color in ends:
        place = float(to_axes.transform((panel.get_xlim()[0], y))[1])
        arrow = " ↑" if place > 1.02 else " ↓" if place < -0.02 else ""
        wanted.append((min(max(place, 0.0), 1.0), text + arrow, color))
    wanted.sort(key=lambda end: end[0])
    for place, (_, text, color) in zip(apart([end[0] for end in wanted], line / height), wanted):
        panel.text(1.02, place, text, transform=panel.transAxes, color=color, va="center", fontsize=9)


def bars(panel, values: dict[str, float], write=plain) -> None:
    """Horizontal bars from the top down, each with its number and its name behind its end."""
    for place, (name, value) in enumerate(values.items()):
        color = COLORS[name_of(name).split(",")[0]]
        panel.barh(-place, value, height=0.7, color=color)
        panel.annotate(f"{write(value)}  {name}", (value, -place), (4, 0), textcoords="offset points", va="center",
                       fontsize=9, color=color)  # fmt: skip
    panel.set_xlim(0, max(values.values()))
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[["bottom"]].set_visible(False)


def apart(places: Sequence[float], gap: float) -> list[float]:
    """The sorted ``places`` in 0 to 1, moved as little as needed to be at least ``gap`` apart."""
    groups: list[list[float]] = []  # [mean place, members]
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (one, n), (other, m) = groups[-2:]
            half = gap * (n + m - 1) / 2
            groups[-2:] = [[max(min((one * n + other * m) / (n + m), 1 - half), half), n + m]]
    return [mean + gap * (i - (count - 1) / 2) for mean, count in groups for i in range(int(count))]


def heat(low: float = 0.0, high: float = 1.0):
    """The colours of heat maps, and a function from a value to the ink that can be read on it."""
    colors = matplotlib.colors.LinearSegmentedColormap.from_list("heat", HEAT)
    return colors, lambda value: "#ffffff" if (value - low) / ((high - low) or 1) > 0.45 else "#22313f"
