"""The figures of docs/results.md, from rows. A colour is a family, a solid line the log-linear model, dashed the linear."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from loglinear.tasks.mqar.figure import draw_accuracy
from loglinear.tasks.niah.figure import draw_heatmaps
from reporting import associative, needles, recall
from reporting.language import Runs, keys
from reporting.rows import LABELS, PAIRS, SOFTMAX, read, seeds_of
from reporting.statistics import Repeats, check_same_sequences, paired, repeats_difference

SHOWN_TOKENS = 1000  # fewer repeats at a distance are in the tables only: noise that would hide the rest
FAMILIES = ("attention", "mamba2", "gated_deltanet")


def draw_all(results: Path, folder: Path) -> Iterator[Path]:
    """Draw what there are rows for; yields the files. Figures without rows are removed: they would tell of others."""
    rows = {name: read(name, results) for name in ("lm", "niah", "mqar")}
    runs = seeds_of(rows["lm"])
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [*_associative(rows["mqar"], folder), *_language(runs, folder), *_recall(runs, folder)]
    for mixer, by_name in needles.heatmap_rows(rows["niah"]).items():
        drawn.append(folder / f"niah_{mixer}.png")
        draw_heatmaps(by_name, drawn[-1], needles.tuned_context(rows["lm"]))
    ours = [*folder.glob("mqar*.png"), *folder.glob("niah_*.png"), *folder.glob("loss_by_position*.png")]
    for path in {*ours, *(folder / f"{name}.png" for name in ("repeats", "retrieval", "levels"))} - {*drawn}:
        path.unlink(missing_ok=True)
    yield from drawn


def _associative(rows: list[dict], folder: Path) -> Iterator[Path]:
    done = associative.experiments(rows)
    if not done:
        return
    found = done[0][2]
    draw_accuracy(associative.grid_of(found), folder / "mqar.png")
    yield folder / "mqar.png"
    matched = {id(result): result for pair in associative.matched_states(found) for result in pair}
    if matched:
        draw_accuracy(list(matched.values()), folder / "mqar_matched.png")
        yield folder / "mqar_matched.png"


def _language(runs: Runs, folder: Path) -> Iterator[Path]:
    for key, long in keys(runs) if runs else []:
        path = folder / ("loss_by_position_long.png" if long else "loss_by_position.png")
        figure = Figure(figsize=(7.5, 7), layout="constrained")
        upper, lower = figure.subplots(2, sharex=True)
        drawn: dict[str, Sequence[float]] = {}
        for mixer, group in runs.items():
            curves = [row["evaluations"][key]["by_position"] for row in group.values() if key in row["evaluations"]]
            if curves:
                middle = [(row[0] + row[1]) / 2 for row in curves[0]]
                drawn[mixer] = np.mean([[row[2] for row in curve] for curve in curves], axis=0).tolist()
                upper.plot(middle, drawn[mixer], **_style(mixer))
        _keep_in_view(upper, drawn)
        for linear, log_linear in PAIRS:
            found = _bucket_differences(runs, linear, log_linear, key)
            if found is not None:
                middle, value, error = found
                style = _style(log_linear) | {"label": f"{LABELS[log_linear]} − {LABELS[linear]}"}
                lower.plot(middle, value, **style)
                lower.fill_between(middle, value - error, value + error, color=style["color"], alpha=0.2, linewidth=0)
        lower.axhline(0, color="grey", linewidth=0.8)
        trained = next(iter(next(iter(runs.values())).values()))["arguments"]["context"]
        for panel, text in ((upper, "loss (nats per token)"), (lower, "difference, ± one standard error")):
            if long:
                panel.axvline(trained, color="grey", linestyle=":", linewidth=1)
            panel.set_ylabel(text)
            if panel.lines[:-1]:
                panel.legend(fontsize=8)
        lower.set_xlabel("position in the sequence (tokens)")
        figure.savefig(path, dpi=150)
        yield path


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
        figure = Figure(figsize=(11, 4 * len(shown)), layout="constrained")
        for line, key in zip(figure.subplots(len(shown), 2, squeeze=False), shown):
            _draw_repeats(line, runs, key)
        figure.savefig(folder / "repeats.png", dpi=150)
        yield folder / "repeats.png"
    asked = recall.retrieval_of(runs)
    if asked:
        _draw_retrieval(asked, folder / "retrieval.png")
        yield folder / "retrieval.png"
    layers = recall.levels_of(runs)
    if layers:
        _draw_levels(layers, folder / "levels.png")
        yield folder / "levels.png"


def _draw_repeats(panels: Sequence, runs: Runs, key: str) -> None:
    """Left: loss by distance. Right: log-linear minus linear on the same tokens. Ranges of few tokens are left out."""
    ranges = {
        mixer: [{r["first"]: r for r in e["repeats"] if r.get("repeated_tokens", 0) >= SHOWN_TOKENS} for e in found]
        for mixer in runs
        if (found := recall.repeats_of(runs, mixer, key))
    }
    drawn: dict[str, Sequence[float]] = {}
    for mixer, seeds in ranges.items():
        distances = sorted(seeds[0])
        drawn[mixer] = [fmean(s[d]["repeated_loss"] for s in seeds) for d in distances]
        panels[0].plot(distances, drawn[mixer], **_style(mixer))
    for linear, log_linear in PAIRS:
        if linear in ranges and log_linear in ranges:
            distances = sorted(ranges[linear][0])
            found = [repeats_difference(*(_at(ranges[m], d) for m in (log_linear, linear))) for d in distances]
            value, error = np.array([d.value for d in found]), np.array([d.error for d in found])
            error[np.isinf(error)] = np.nan
            style = _style(log_linear) | {"label": f"{LABELS[log_linear]} − {LABELS[linear]}"}
            panels[1].plot(distances, value, **style)
            panels[1].fill_between(
                distances, value - error, value + error, color=style["color"], alpha=0.2, linewidth=0
            )
    panels[1].axhline(0, color="grey", linewidth=0.8)
    for panel, text in zip(panels, ("loss on repeats (nats per token)", "difference, ± one standard error")):
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens since the repeat")
        panel.set_ylabel(text)
        panel.set_title(key.replace("-", " tokens, packing "), fontsize=10)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    _keep_in_view(panels[0], drawn)


def _at(seeds: list[dict[int, dict]], distance: int) -> Repeats:
    sums = np.mean([ranges[distance]["repeated_sums"] for ranges in seeds], axis=0)
    return Repeats(sums, np.array(seeds[0][distance]["repeated_counts"]))


def _draw_retrieval(asked: dict[str, dict[int, list[dict]]], path: Path) -> None:
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    panel = figure.subplots()
    for mixer, by_distance in asked.items():
        distances = sorted(by_distance)
        exact, error, without = (
            np.array([fmean(row[name] for row in by_distance[d]) for d in distances])
            for name in ("exact", "exact_standard_error", "without")
        )
        style = _style(mixer)
        panel.plot(distances, exact, **style)
        panel.fill_between(distances, exact - error, exact + error, color=style["color"], alpha=0.15, linewidth=0)
        panel.plot(distances, without, color="grey", linewidth=0.7, linestyle=":")
    panel.set_xscale("log", base=2)
    panel.set_ylim(-0.02, 1.02)
    panel.set_xlabel("tokens since the definition (dotted: without it)")
    panel.set_ylabel("share of exact values")
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _draw_levels(found: dict[str, list[dict]], path: Path) -> None:
    widest = max(len(layer["mean"]) for layers in found.values() for layer in layers)
    figure = Figure(figsize=(1 + 0.42 * widest * len(found), 4.5), layout="constrained")
    for panel, (mixer, layers) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
        values = np.full((len(layers), widest), np.nan)
        for line, layer in zip(values, layers):
            line[: len(layer["mean"])] = np.array(layer["mean"], dtype=float)  # None becomes nan
        image = panel.imshow(values, aspect="auto", cmap="viridis")
        panel.set_title(f"{LABELS[mixer]}: mean λ", fontsize=10)
        panel.set_xlabel("level (0: the token itself)")
        panel.set_yticks(range(len(layers)), [layer["layer"] for layer in layers], fontsize=7)
        figure.colorbar(image, ax=panel)
    figure.savefig(path, dpi=150)


def _style(mixer: str) -> dict:
    family = FAMILIES.index(mixer.removeprefix("log_linear_"))
    dashed = mixer in dict(PAIRS)
    return {"color": f"C{family}", "linestyle": "--" if dashed else "-", "marker": ".", "label": LABELS[mixer]}


def _keep_in_view(panel, curves: dict[str, Sequence[float]]) -> None:
    """End the axis above the recurrent models: beyond its trained context softmax attention can be far above them."""
    recurrent = [value for mixer, curve in curves.items() if mixer != SOFTMAX for value in curve]
    if recurrent and SOFTMAX in curves:
        top = max(recurrent) + 0.5 * (max(recurrent) - min(recurrent))
        if max(curves[SOFTMAX]) > top:
            panel.set_ylim(top=top)
            panel.set_title(f"{panel.get_title()} ({LABELS[SOFTMAX]} leaves the frame)".strip(), fontsize=10)
