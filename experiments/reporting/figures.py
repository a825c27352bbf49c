"""The figures of docs/results.md, from rows. A colour is a model, a solid line a log-linear model, dashed its linear twin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from loglinear.tasks.lm.figure import position_axis
from loglinear.tasks.lm.levels import draw_level_map
from loglinear.tasks.lm.retrieval import share_axes
from loglinear.tasks.mqar.figure import draw_accuracy
from loglinear.tasks.mqar.report import Result
from loglinear.tasks.niah.figure import draw_heatmaps
from loglinear.tasks.style import COLORS, FAINT, canvas, label_ends, save, styled, token_axis, tokens
from reporting import associative, levels, needles, recall
from reporting.language import FAR, Runs, differences_by_seed, keys
from reporting.rows import LABELS, PAIRS, SOFTMAX, read, seeds_of
from reporting.statistics import (
    Repeats,
    check_same_sequences,
    edge_at,
    paired,
    repeats_beyond,
    repeats_difference,
)
from reporting.text import signed

SHOWN_TOKENS = 1000  # fewer repeats at a distance are in the tables only: noise that would hide the rest
LINEAR, LOG_LINEAR = ([pair[i] for pair in PAIRS] for i in (0, 1))
NAMES = (
    "mqar*",
    "niah_*",
    "loss_by_position*",
    "repeats",
    "retrieval",
    "levels",
    "levels_add",
)  # of figures drawn here


def draw_all(results: Path, folder: Path) -> Iterator[Path]:
    """Draw what there are rows for; yields the files. Figures without rows are removed: they would tell of others."""
    rows = {name: read(name, results) for name in ("lm", "niah", "mqar")}
    runs = seeds_of(rows["lm"])
    folder.mkdir(parents=True, exist_ok=True)
    found = levels.gains(read("recall", results), read("text_stacks", results))
    opening = levels.draw(found, folder / "levels_add") if found else []
    drawn = [*opening, *_associative(rows["mqar"], folder), *_language(runs, folder), *_recall(runs, folder)]
    tuned = needles.tuned_context(rows["lm"])
    for mixer, by_name in needles.heatmap_rows(rows["niah"]).items():
        if len(by_name) == 1:
            by_name = {LABELS[mixer]: next(iter(by_name.values()))}
        drawn += draw_heatmaps(by_name, folder / f"niah_{mixer}", tuned)
    ours = {path for name in NAMES for suffix in ("png", "svg") for path in folder.glob(f"{name}.{suffix}")}
    for path in ours - {*drawn}:
        path.unlink()
    yield from drawn


def _associative(rows: list[dict], folder: Path) -> Iterator[Path]:
    done = associative.experiments(rows)
    if not done:
        return
    grid = associative.grid_of(done[0][2])
    cells = associative.cells(grid)
    level = sum(cell.not_below for cell in cells)
    title = f"Associative recall: log-linear models are level with their linear twins or ahead in {level} of {len(cells)} cells"
    yield from draw_accuracy(grid, folder / "mqar", title if cells else None)
    pairs = associative.matched_states(done[0][2])
    if pairs:
        yield from draw_accuracy(_once(pairs), folder / "mqar_matched", _matched_title(pairs))


def _once(pairs: Iterable[tuple[Result, Result]]) -> list[Result]:
    return list({id(result): result for pair in pairs for result in pair}.values())


def _matched_title(pairs: Sequence[tuple[Result, Result]]) -> str:
    """``pairs``: log-linear and linear results with the same total state."""
    ahead = sum(linear.accuracy["mean"][0] > own.accuracy["mean"][0] for own, linear in pairs)
    where = f"in {ahead} of {len(pairs)} pairs"
    return f"With one state as large as all of theirs, linear models recall more than log-linear ones {where}"


def _language(runs: Runs, folder: Path) -> Iterator[Path]:
    for key, long in keys(runs) if runs else []:
        yield from _losses(runs, key, long, folder / ("loss_by_position_long" if long else "loss_by_position"))


@styled
def _losses(runs: Runs, key: str, long: bool, path: Path) -> list[Path]:
    trained = next(iter(next(iter(runs.values())).values()))["arguments"]["context"]
    title = _loss_title(runs, key, trained if long else FAR)
    figure, made = canvas(title, (2, 1), (5.2, 2.5), left=0.8, right=2.2, gaps=(0.3, 0.35))
    upper, lower = made[:, 0]
    curves: dict[str, list[float]] = {}
    length = 0
    for mixer, group in runs.items():
        found = [row["evaluations"][key]["by_position"] for row in group.values() if key in row["evaluations"]]
        if found:
            length = found[0][-1][1] + 2  # positions are of predictions, one fewer than tokens
            middle = [(row[0] + row[1]) / 2 for row in found[0]]
            curves[mixer] = np.mean([[row[2] for row in curve] for curve in found], axis=0).tolist()
            upper.plot(middle, curves[mixer], **_style(mixer))
    _keep_in_view(upper, curves)
    label_ends(upper, [(curve[-1], LABELS[mixer], COLORS[LABELS[mixer]]) for mixer, curve in curves.items()])
    ends = []
    for linear, log_linear in PAIRS:
        found = _bucket_differences(runs, linear, log_linear, key)
        if found is not None:
            ends.append(_difference(lower, linear, log_linear, *found))
    lower.axhline(0, color=FAINT, linewidth=0.8)
    label_ends(lower, ends, line=0.3)
    for panel in (upper, lower):
        position_axis(panel, length)
        if long:
            panel.axvline(trained, color=FAINT, linestyle=":", linewidth=1)
    upper.tick_params(labelbottom=False)
    upper.set_ylabel("loss (nats per token)")
    lower.set_ylabel("difference (nats)")
    lower.set_xlabel(f"position in the sequence (tokens){f'; dotted: trained to {tokens(trained)}' if long else ''}")
    return save(figure, path)


def _loss_title(runs: Runs, key: str, first: int) -> str:
    """Mean over seeds of the loss from position ``first`` on, each log-linear model against its linear twin."""
    parts = []
    for linear, log_linear in PAIRS:
        rows = [row for row in runs.get(linear, {}).values() if key in row["evaluations"]]
        edge = edge_at(rows[0]["evaluations"][key], first) if rows else None
        found = {} if edge is None else differences_by_seed(runs, linear, log_linear, key, edge)
        if found:
            mean = signed(fmean(d.value for d in found.values()), 3)
            parts.append(f"{mean} nats for {LABELS[log_linear]}")
    if not parts:
        return "Loss by position in the sequence"
    return f"Loss past position {tokens(first)} against the linear twin, mean over seeds: {', '.join(parts)}"


def _difference(panel, linear: str, log_linear: str, places, value, error) -> tuple[float, str, str]:
    """Draws log-linear minus linear with a band of one standard error; returns where it ends, its label and colour."""
    style = _style(log_linear)
    panel.plot(places, value, **style)
    panel.fill_between(places, value - error, value + error, color=style["color"], alpha=0.2, linewidth=0)
    return float(value[-1]), f"{LABELS[log_linear]}\n− {LABELS[linear]}", style["color"]


def _bucket_differences(runs: Runs, linear: str, log_linear: str, key: str) -> tuple[np.ndarray, ...] | None:
    """Middle of each bucket, log-linear minus linear (mean over seeds), and its standard error over sequences."""
    both = [
        (row["evaluations"][key], runs[linear][seed]["evaluations"][key])
        for seed, row in runs.get(log_linear, {}).items()
        if seed in runs.get(linear, {}) and key in row["evaluations"] and key in runs[linear][seed]["evaluations"]
    ]
    if not both:
        return None
    check_same_sequences([evaluation for pair in both for evaluation in pair])
    one, other = (np.mean([pair[i]["per_sequence"]["losses"] for pair in both], axis=0) for i in (0, 1))
    found = [paired(one[:, bucket], other[:, bucket]) for bucket in range(one.shape[1])]
    edges = np.array(both[0][0]["per_sequence"]["edges"])
    return (edges[:-1] + edges[1:] - 1) / 2, np.array([d.value for d in found]), np.array([d.error for d in found])


def _recall(runs: Runs, folder: Path) -> Iterator[Path]:
    shown = recall.repeat_keys(runs)
    if shown:
        yield from _repeats(runs, shown, folder / "repeats")
    asked = recall.retrieval_of(runs)
    if asked:
        yield from _draw_retrieval(asked, folder / "retrieval")
    layers = recall.levels_of(runs)
    if layers:
        yield from _draw_levels(layers, folder / "levels")


@styled
def _repeats(runs: Runs, shown: list[str], path: Path) -> list[Path]:
    figure, made = canvas(
        _repeats_title(runs, shown[0]), (2, len(shown)), (4.2, 2.5), left=0.8, right=2.2, gaps=(0.75, 0.5)
    )
    for column, key in zip(made.T, shown):
        _draw_repeats(column, runs, key, column[0] is made[0, -1])
    return save(figure, path)


def _repeats_title(runs: Runs, key: str) -> str:
    found = {mixer: recall.repeats_of(runs, mixer, key) for mixer in runs}
    beyond = {mixer: repeats_beyond(some, recall.FAR) for mixer, some in found.items() if some}
    return _said(
        f"A repeat from over {tokens(recall.FAR)} tokens ago costs",
        {mixer: part.loss for mixer, part in beyond.items() if part is not None},
        lambda value: f"{value:.2f}",
        " nats",
    )


def _said(start: str, values: dict[str, float], write, unit: str) -> str:
    """``start`` and the range of the values of log-linear models, of linear ones, and of the Transformer, in words."""
    parts = []
    for who, mixers in (("log-linear models", LOG_LINEAR), ("linear models", LINEAR), ("the Transformer", [SOFTMAX])):
        some = dict.fromkeys(write(value) for value in sorted(values[m] for m in mixers if m in values))
        if some:
            parts.append(f"{who} {' to '.join(some)}")
    return f"{start} {', '.join(parts)}{unit}"


def _draw_repeats(panels: Sequence, runs: Runs, key: str, named: bool) -> None:
    """Above: loss by distance. Below: log-linear minus linear on the same tokens. Ranges of few tokens are left out."""
    ranges = {
        mixer: [{r["first"]: r for r in e["repeats"] if r.get("repeated_tokens", 0) >= SHOWN_TOKENS} for e in found]
        for mixer in runs
        if (found := recall.repeats_of(runs, mixer, key))
    }
    curves: dict[str, list[float]] = {}
    distances: list[int] = []
    for mixer, seeds in ranges.items():
        distances = sorted(seeds[0])
        curves[mixer] = [fmean(s[d]["repeated_loss"] for s in seeds) for d in distances]
        panels[0].plot(distances, curves[mixer], **_style(mixer))
    ends = []
    for linear, log_linear in PAIRS:
        if linear in ranges and log_linear in ranges:
            places = sorted(ranges[linear][0])
            found = [repeats_difference(*(_at(ranges[m], d) for m in (log_linear, linear))) for d in places]
            value, error = np.array([d.value for d in found]), np.array([d.error for d in found])
            error[np.isinf(error)] = np.nan
            ends += [_difference(panels[1], linear, log_linear, places, value, error)] if places else []
    panels[1].axhline(0, color=FAINT, linewidth=0.8)
    _keep_in_view(panels[0], curves)
    for panel, text in zip(panels, ("loss on repeats (nats)", "difference (nats)")):
        panel.set_ylabel(text)
        if distances:
            token_axis(panel, distances)
    context, packing = key.split("-")
    panels[0].set_title(f"sequences of {tokens(int(context))} tokens, packing {packing}")
    panels[1].set_xlabel("tokens since the repeat")
    if named:
        last = {mixer: curve[-1] for mixer, curve in curves.items() if curve}
        label_ends(panels[0], [(y, LABELS[mixer], COLORS[LABELS[mixer]]) for mixer, y in last.items()])
        label_ends(panels[1], ends, line=0.3)


def _at(seeds: list[dict[int, dict]], distance: int) -> Repeats:
    sums = np.mean([ranges[distance]["repeated_sums"] for ranges in seeds], axis=0)
    return Repeats(sums, np.array(seeds[0][distance]["repeated_counts"]))


@styled
def _draw_retrieval(asked: dict[str, dict[int, list[dict]]], path: Path) -> list[Path]:
    near = min(distance for by_distance in asked.values() for distance in by_distance)
    shares = {m: fmean(r["exact"] for r in by[near]) for m, by in asked.items() if near in by}
    start = f"Definitions that are given back exactly after {tokens(near)} tokens:"
    figure, panels = canvas(_said(start, shares, lambda share: f"{share:.0%}", ""), size=(5.0, 2.8), right=2.2)
    panel, ends = panels[0, 0], []
    for mixer, by_distance in asked.items():
        distances = sorted(by_distance)
        exact, error, without = (
            np.array([fmean(row[name] for row in by_distance[d]) for d in distances])
            for name in ("exact", "exact_standard_error", "without")
        )
        style = _style(mixer)
        panel.plot(distances, exact, **style)
        panel.fill_between(distances, exact - error, exact + error, color=style["color"], alpha=0.15, linewidth=0)
        panel.plot(distances, without, color=FAINT, linewidth=0.7, linestyle=":")
        ends.append((exact[-1], LABELS[mixer], style["color"]))
    share_axes(panel, [distance for by_distance in asked.values() for distance in by_distance])
    panel.set_xlabel("tokens since the definition (dotted: the definition is cut out)")
    label_ends(panel, ends)
    return save(figure, path)


@styled
def _draw_levels(found: dict[str, list[dict]], path: Path) -> list[Path]:
    widest = max(len(layer["mean"]) for layers in found.values() for layer in layers)
    deepest = max(len(layers) for layers in found.values())
    parts = []
    for mixer, layers in found.items():
        levels = [np.array(layer["mean"], dtype=float) for layer in layers]  # None becomes nan
        means = [float(np.mean([layer[level] for layer in levels])) for level in (1, _last(levels))]
        parts.append(f"{means[1] / means[0]:.2f} times that of the nearest in {LABELS[mixer]}")
    title = f"λ of the farthest bucket is {', and '.join(parts)} (mean over layers)"
    size = (0.6 + 0.3 * widest, 0.7 + 0.24 * deepest)
    figure, panels = canvas(title, (1, len(found)), size, gaps=(0.6, 0.5))
    for panel, (mixer, layers) in zip(panels[0], found.items()):
        values = np.full((len(layers), widest), np.nan)
        for line, layer in zip(values, layers):
            line[: len(layer["mean"])] = np.array(layer["mean"], dtype=float)
        draw_level_map(panel, values, [layer["layer"].removeprefix("layers.") for layer in layers])
        panel.set_title(f"{LABELS[mixer]}: mean λ")
    panels[0, 0].set_ylabel("layer")
    return save(figure, path)


def _last(levels: list[np.ndarray]) -> int:
    """The last level at which some token of every layer has a bucket."""
    return int(np.flatnonzero(np.isfinite(np.sum(levels, axis=0)))[-1])


def _style(mixer: str) -> dict:
    return {"color": COLORS[LABELS[mixer]], "linestyle": "--" if mixer in LINEAR else "-", "marker": "."}


def _keep_in_view(panel, curves: dict[str, list[float]]) -> None:
    """End the axis above the recurrent models: beyond its trained context softmax attention can be far above them."""
    recurrent = [value for mixer, curve in curves.items() if mixer != SOFTMAX for value in curve]
    if recurrent and SOFTMAX in curves:
        top = max(recurrent) + 0.5 * (max(recurrent) - min(recurrent))
        if max(curves[SOFTMAX]) > top:
            panel.set_ylim(top=top)
