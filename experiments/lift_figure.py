"""The figure of ``lift.py``: lifted beside plain, the loss by position, and needles found after the same fine-tune."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from loglinear.tasks.style import (
    COLORS,
    FAINT,
    canvas,
    label_ends,
    name_of,
    plain_axis,
    save,
    signed,
    styled,
    tokens,
)

EVALUATION = "16384-document"
NEEDLES = ("number", "word", "multi-key", "multi-value")


@styled
def draw_lift(losses: list[dict], needles: list[dict], path: Path) -> list[Path]:
    """``losses``: rows of lift.jsonl. ``needles``: rows of lift_needles.jsonl. Saves PNG and SVG."""
    mixers = sorted({row["base"].rpartition("-")[0] for row in losses}, reverse=True)
    means, lines = {}, {}
    for mixer in mixers:
        edges, rows = _differences(losses, mixer)
        columns = list(zip(*rows))
        lines[mixer] = [
            (place, statistics.fmean(column), statistics.stdev(column) / math.sqrt(len(column)))
            for place, column in zip(edges[1:], columns)
        ]
        means[mixer] = statistics.fmean(map(statistics.fmean, rows))
    gains = " and ".join(f"{-means[mixer]:.3f} ({name_of(mixer)})" for mixer in mixers)
    title = f"Lifted models predict text better, by {gains} nats a token, and find fewer of several needles"
    parameters = max(row["parameters"] for row in losses if row["kind"] == "plain")
    note = (
        f"{parameters / 1e6:.0f}M parameters, {losses[0]['tokens'] / 1e6:.0f}M tokens more, two seeds each, H200; "
        "bands: one standard error; needles: two fine-tunes of 400 steps each, ends of a line: plain and lifted (dot)"
    )
    figure, panels = canvas(title, (1, 2), (3.6, 3.0), right=1.6, gaps=(2.1, 0.5), note=note)
    left, right = panels[0]
    ends = []
    for mixer, points in lines.items():
        places, middle, error = zip(*points)
        color = COLORS[name_of(mixer)]
        left.plot(places, middle, color=color, marker="o")
        left.fill_between(
            places,
            *([m + sign * e for m, e in zip(middle, error)] for sign in (-1, 1)),
            color=color,
            alpha=0.2,
            linewidth=0,
        )
        ends.append((middle[-1], name_of(mixer), color))
    left.axhline(0, color=FAINT, linestyle=":", linewidth=1)
    plain_axis(left.xaxis, range(0, 16385, 4096), tokens)
    left.set_xlabel("position (tokens)")
    left.set_title("loss of lifted minus plain, nats")
    plain_axis(left.yaxis, [0, -0.01, -0.02, -0.03], lambda value: signed(value, 2) if value else "0")
    label_ends(left, ends)
    _draw_needles(right, needles, mixers)
    return save(figure, path)


def _differences(rows: list[dict], mixer: str) -> tuple[list[float], list[list[float]]]:
    """Edges of the buckets of positions, and lifted minus plain in each, for every sequence of every pair."""
    found = {(row["base"], row["kind"]): row["evaluations"][EVALUATION]["per_sequence"] for row in rows}
    differences: list[list[float]] = []
    edges: list[float] = []
    for base in sorted({base for base, _ in found if base.rpartition("-")[0] == mixer}):
        plain, lifted = found[base, "plain"], found[base, "lifted"]
        edges = plain["edges"]
        for one, other in zip(plain["losses"], lifted["losses"], strict=True):
            differences.append([b - a for a, b in zip(one, other, strict=True)])
    return edges, differences


def _draw_needles(panel, rows: list[dict], mixers: list[str]) -> None:
    """A line from plain to lifted for each fine-tune, in a column for each kind of needle and mixer."""
    from lift import share

    found = {(row["base"], row["tune_seed"], row["kind"]): row for row in rows}
    for place, needle in enumerate(NEEDLES):
        for side, mixer in enumerate(mixers):
            pairs = [key for key in found if key[2] == "plain" and key[0].rpartition("-")[0] == mixer]
            for offset, key in enumerate(sorted(pairs)):
                base, tune, _ = key
                ends = [share(found[base, tune, kind], needle) for kind in ("plain", "lifted")]
                x = place + 0.36 * (side - 0.5) + 0.07 * (offset - 1.5)
                color = COLORS[name_of(mixer)]
                panel.plot([x, x], ends, color=color, linewidth=1.2)
                panel.plot([x], ends[1:], color=color, marker="o")
    panel.set_xticks(range(len(NEEDLES)), NEEDLES, fontsize=8.5)
    panel.set_ylim(0, 1.05)
    plain_axis(panel.yaxis, [0, 0.25, 0.5, 0.75, 1], lambda value: f"{value:.0%}")
    panel.set_title("needles found, up to 16K tokens")
