"""The gains of levels by task, with their errors: the opening of the page of results, from rows of many paired seeds.

A gain is the mean difference between a log-linear model and its linear twin over seeds. Models of one seed saw the same data
in the same order, so the error is the standard error of these differences. A word of verdict follows from the two numbers
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from loglinear.tasks.mqar.config import MODELS, Cell
from loglinear.tasks.style import COLORS, INK, canvas, save, styled
from recall_plan import FRESH_SEEDS, LINEAR, Arm, best_rate, cell_of
from reporting.statistics import Difference, paired
from reporting.text import difference, table

KINDS = {
    "first": "recall, pairs first",
    "any": "recall, pairs and queries anywhere",
    "end": "recall, queries at the end",
    "tagged": "recall, at the end, a key's class tells its bucket",
    "latest-newest": "recall, the newest of four values",
    "latest-first": "recall, the first of four values",
}
STARTS = ("one", "paper", "noise")
ERRORS = 3  # standard errors from which on a difference is called one
# Numbers of the paper for the same task, from summaries: one seed (Guo et al. 2025).
PAPER = {
    ("recall, pairs first", "Mamba-2"): "+1.4 (width 32), +3.3 (width 64), T = 256",
    ("recall, pairs first", "Gated DeltaNet"): "+5.4 (width 32), T = 256",
    ("perplexity", "Mamba-2"): "−1.5%",
    ("perplexity", "Gated DeltaNet"): "−1.3%",
    ("needles", "Mamba-2"): "+43.0 (1 key, 8K), +16.0 (keys, 4K)",
    ("needles", "Gated DeltaNet"): "+26.4 (keys, 4K)",
}


@dataclass(frozen=True)
class Gain:
    """One comparison: ``difference`` is log-linear minus linear, in points of exact answers or percent of perplexity."""

    where: str
    pair: str
    linear: float
    log_linear: float
    difference: Difference
    seeds: int
    unit: str
    lower_is_better: bool = False

    @property
    def verdict(self) -> str:
        """better, worse, or no difference shown."""
        if abs(self.difference.value) <= ERRORS * self.difference.error:
            return "no difference shown"
        return "better" if (self.difference.value < 0) == self.lower_is_better else "worse"

    def cells(self) -> list[str]:
        paper = PAPER.get((self.where.split(":")[0], self.pair), "")
        shown = f"{difference(self.difference, 1 if self.unit == 'points' else 2)} {self.unit}"
        return [
            self.where,
            self.pair,
            f"{self.linear:.2f}",
            f"{self.log_linear:.2f}",
            shown,
            str(self.seeds),
            self.verdict,
            paper,
        ]


def recall_gains(rows: Sequence[dict], start: str = "one", width: int = 32) -> Iterator[Gain]:
    """Of each kind and pair that has fresh seeds of both, in percent of values recalled."""
    found = {cell_of(row["cell"]): row for row in rows}
    for kind, where in KINDS.items():
        for linear in LINEAR:
            both = (
                shares(Arm(kind, linear, width=width), found),
                shares(Arm(kind, f"Log-Linear {linear}", start, width), found),
            )
            gain = _gain(*both)
            if gain is not None:
                yield Gain(where, linear, *gain, "points")


def shares(arm: Arm, rows: dict[Cell, dict]) -> dict[int, float]:
    """Percent of values recalled, a mean over numbers of pairs, by fresh seed."""
    rate = best_rate(arm, rows)
    cells = {} if rate is None else {seed: arm.cell(rate, seed) for seed in FRESH_SEEDS}
    return {seed: 100 * fmean(rows[cell]["test"].values()) for seed, cell in cells.items() if cell in rows}


def text_values(rows: Sequence[dict], mixer: str, start: str, value) -> dict[int, float]:
    """``value(row)`` of the fresh seeds of a language model, where a row has it."""
    fresh = [
        row
        for row in rows
        if (row["copy"]["mixer"], row["copy"]["start"], row["copy"]["part"]) == (mixer, start, "fresh")
    ]
    return {row["copy"]["seed"]: found for row in fresh if (found := value(row)) is not None}


def text_gains(rows: Sequence[dict], start: str = "one") -> Iterator[Gain]:
    """Perplexity in percent: at the trained length, in its last quarter, and at four times it."""
    places = {
        "perplexity: 8K, trained length": lambda row: fmean(row["test"]),
        "perplexity: 8K, last quarter": lambda row: fmean(row["test"][-4:]),
        "perplexity: 32K, behind the trained length": lambda row: fmean(row["far"][4:]),
    }
    for where, value in places.items():
        for linear in LINEAR:
            mixer = MODELS[linear]
            both = [text_values(rows, *one, value) for one in ((mixer, ""), (f"log_linear_{mixer}", start))]
            gain = _gain(*both)
            if gain is not None:
                nats = gain[2]
                percent = Difference(100 * np.expm1(nats.value), 100 * np.exp(nats.value) * nats.error)
                one, ours = (float(np.exp(x)) for x in gain[:2])
                yield Gain(where, linear, one, ours, percent, gain[3], "%", lower_is_better=True)


def needle_gains(rows: Sequence[dict], start: str = "one") -> Iterator[Gain]:
    """Percent of exact answers by kind, a mean over lengths up to the trained one, and beyond it."""
    for kind in ("1 key", "4 keys", "16 keys", "64 keys", "4 values"):
        for where, inside in (("to 8K", True), ("16K to 64K", False)):

            def value(row: dict, kind: str = kind, inside: bool = inside) -> float | None:
                named = {
                    name.rpartition(" ")[2]: share for name, share in row.get("needles", {}).items() if _is(name, kind)
                }
                found = [share for context, share in named.items() if (int(context) <= 8192) == inside]
                return 100 * fmean(found) if found else None

            for linear in LINEAR:
                mixer = MODELS[linear]
                both = [text_values(rows, *one, value) for one in ((mixer, ""), (f"log_linear_{mixer}", start))]
                gain = _gain(*both)
                if gain is not None:
                    yield Gain(f"needles: {kind}, {where}", linear, *gain, "points")


def _is(name: str, kind: str) -> bool:
    rest = name.removeprefix(f"{kind} ")
    return rest != name and rest.isdigit()


def _gain(linear: dict[int, float], ours: dict[int, float]) -> tuple[float, float, Difference, int] | None:
    """Means and difference over the seeds that both have; None below three."""
    seeds = sorted(linear.keys() & ours.keys())
    if len(seeds) < 3:
        return None
    one, other = (np.array([values[seed] for seed in seeds]) for values in (linear, ours))
    return float(one.mean()), float(other.mean()), paired(other, one), len(seeds)


def start_lines(rows: Sequence[dict], text: Sequence[dict]) -> list[str]:
    """A table of where λ starts: difference to the linear twin for each start, by kind and pair."""
    lines = []
    named = {start: {(gain.where, gain.pair): gain for gain in _all(rows, text, start)} for start in STARTS}
    for key in dict.fromkeys(key for gains in named.values() for key in gains):
        found = [named[start].get(key) for start in STARTS]
        if sum(gain is not None for gain in found) > 1:
            shown = [
                "" if gain is None else difference(gain.difference, 1 if gain.unit == "points" else 2) for gain in found
            ]
            unit = next(gain.unit for gain in found if gain is not None)
            lines.append([key[0], key[1], *shown, unit])
    return table(["where", "pair", *STARTS, "unit"], lines, words=2) if lines else []


def _all(recall: Sequence[dict], text: Sequence[dict], start: str) -> list[Gain]:
    return [*recall_gains(recall, start), *text_gains(text, start), *needle_gains(text, start)]


def gains(recall: Sequence[dict], text: Sequence[dict]) -> list[Gain]:
    """All comparisons that have rows, with λ that starts at 1."""
    return _all(recall, text, "one")


def opening(recall: Sequence[dict], text: Sequence[dict]) -> list[str]:
    """Lines of the page: figure, table, and when to use levels. Empty without rows."""
    found = gains(recall, text)
    if not found:
        return []
    headers = ["where", "twin", "linear", "log-linear", "difference", "seeds", f"beyond {ERRORS} errors", "the paper"]
    lines = [
        "![Gains of levels by task](figures/levels_add.svg)",
        "",
        "Log-linear minus linear, mean and standard error over seeds; models of one seed saw the same data in the same order. "
        "Recall and needles are percent of exact answers, a mean over numbers of pairs or lengths. The linear and log-linear "
        "columns of perplexity are perplexities. λ starts at 1.",
        "",
        *table(headers, [gain.cells() for gain in found], words=2),
        "",
        "## When to use it, what to set",
        "",
    ]
    for word, start in (
        ("better", "Log-linear is better"),
        ("worse", "Log-linear is worse"),
        ("no difference shown", "No difference is shown"),
    ):
        some = [
            f"{gain.where} ({gain.pair}, {difference(gain.difference, 1)} {gain.unit})"
            for gain in found
            if gain.verdict == word
        ]
        lines += [
            f"- **{start}** in {len(some)} of {len(found)} comparisons{': ' + '; '.join(some) if some else ''}.",
            "",
        ]
    starts = start_lines(recall, text)
    if starts:
        lines += ["Difference to the linear twin by the start of λ (`level_scale_start`):", "", *starts, ""]
    return lines


@styled
def draw(found: Sequence[Gain], path: Path) -> list[Path]:
    """Differences that are good for log-linear point right; bars are standard errors."""
    points = [gain for gain in found if gain.unit == "points"]
    clear = sum(gain.verdict == "better" for gain in found)
    title = f"Levels help beyond {ERRORS} standard errors in {clear} of {len(found)} comparisons of paired seeds"
    wheres = (
        list(dict.fromkeys(gain.where for gain in points)),
        list(dict.fromkeys(g.where for g in found if g.unit == "%")),
    )
    rows = max(1, *(len(one) for one in wheres))
    columns = 1 + bool(wheres[1])
    figure, panels = canvas(title, (1, columns), (3.6, 0.32 * rows + 0.4), left=3.4, gaps=(3.1, 0.4))
    labels = ("points of exact answers", "percent of perplexity saved")
    for panel, some, label in zip(panels[0], wheres, labels):
        for gain in found:
            if gain.where in some:
                offset = 0.14 if gain.pair == "Mamba-2" else -0.14
                sign, color = -1 if gain.lower_is_better else 1, COLORS[f"Log-Linear {gain.pair}"]
                place = -some.index(gain.where) + offset
                panel.errorbar(sign * gain.difference.value, place, xerr=gain.difference.error, fmt="o", color=color)
        panel.axvline(0, color=INK, linewidth=0.8)
        panel.set_yticks([-i for i in range(len(some))], some, fontsize=8)
        panel.set_ylim(-len(some) + 0.4, 0.6)
        panel.set_xlabel(label)
    for place, pair in enumerate(LINEAR):
        panels[0][0].text(0.99, 0.02 + 0.07 * place, pair, color=COLORS[f"Log-Linear {pair}"], ha="right",
                          transform=panels[0][0].transAxes, fontsize=9)  # fmt: skip
    return save(figure, path)
