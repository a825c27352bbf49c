"""The gains of levels by task, with their errors: the opening of the page of results, from rows of many paired seeds.

A gain is the mean difference between a log-linear model and its linear twin over seeds. Models of one seed saw the same data
in the same order, so the error is the standard error of these differences. A word of verdict follows from the two numbers
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
LEAST = 2.0  # percent of exact answers that one of two models must give, or neither has learned the task
# Parts of the language models' plan: rate, and samples of the fine-tune on needles.
PARTS = {
    "fresh": "rate 0.008; needles after 700 steps on 1K to 8K",
    "second": "rate 0.016; needles after 1,000 steps at 0.004 on 256 to 8K",
}
SHORT = {"fresh": "first recipe", "second": "second recipe"}
# Numbers of the paper for the same task, from summaries: one seed (Guo et al. 2025).
PAPER = {
    ("recall, pairs first", "Mamba-2"): "+1.4 (width 32), +3.3 (width 64), T = 256",
    ("recall, pairs first", "Gated DeltaNet"): "+5.4 (width 32), T = 256",
    ("perplexity, 8K, trained length", "Mamba-2"): "−1.5%",
    ("perplexity, 8K, trained length", "Gated DeltaNet"): "−1.3%",
    ("needles, 1 key, to 8K", "Mamba-2"): "+43.0 (8K)",
    ("needles, 4 keys, to 8K", "Mamba-2"): "+16.0 (4K)",
    ("needles, 4 keys, to 8K", "Gated DeltaNet"): "+26.4 (4K)",
}


@dataclass(frozen=True)
class Gain:
    """One comparison: ``difference`` is log-linear minus linear, in points of exact answers or percent of perplexity.

    ahead: seeds with which the log-linear model is better. part: of the language models' plan; empty for recall.
    """

    where: str
    pair: str
    linear: float
    log_linear: float
    difference: Difference
    seeds: int
    ahead: int
    unit: str
    part: str = ""

    @property
    def learned(self) -> bool:
        return self.unit == "%" or max(self.linear, self.log_linear) >= LEAST

    @property
    def verdict(self) -> str:
        """better, worse, not learned by either, or undecided."""
        if not self.learned:
            return "not learned"
        if abs(self.difference.value) <= ERRORS * self.difference.error:
            return "undecided"
        return "better" if (self.difference.value < 0) == (self.unit == "%") else "worse"

    @property
    def name(self) -> str:
        return self.where + (f" ({SHORT[self.part]})" if self.part else "")

    @property
    def shown(self) -> str:
        digits, unit = (2, "%") if self.unit == "%" else (1, " points")
        return f"{difference(self.difference, digits)}{unit}"

    def cells(self) -> list[str]:
        paper = PAPER.get((self.where, self.pair), "")
        ahead = f"{self.ahead} of {self.seeds}"
        return [
            self.name,
            self.pair,
            f"{self.linear:.2f}",
            f"{self.log_linear:.2f}",
            self.shown,
            ahead,
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
                yield Gain(where, linear, *gain[:4], gain[4], "points")


def shares(arm: Arm, rows: dict[Cell, dict]) -> dict[int, float]:
    """Percent of values recalled, a mean over numbers of pairs, by fresh seed."""
    rate = best_rate(arm, rows)
    cells = {} if rate is None else {seed: arm.cell(rate, seed) for seed in FRESH_SEEDS}
    return {seed: 100 * fmean(rows[cell]["test"].values()) for seed, cell in cells.items() if cell in rows}


Value = Callable[[dict], float | None]


def text_values(rows: Sequence[dict], mixer: str, start: str, part: str, value: Value) -> dict[int, float]:
    """``value(row)`` of the seeds of a language model, where a row has it."""
    wanted = (mixer, start, part)
    some = [row for row in rows if tuple(row["copy"][name] for name in ("mixer", "start", "part")) == wanted]
    return {row["copy"]["seed"]: found for row in some if (found := value(row)) is not None}


def text_gain(rows: Sequence[dict], where: str, linear: str, part: str, value: Value, unit: str) -> Iterator[Gain]:
    """The gain of ``value``, points of a share or nats; nats become percent of perplexity."""
    mixer = MODELS[linear]
    both = [text_values(rows, *one, part, value) for one in ((mixer, ""), (f"log_linear_{mixer}", "one"))]
    gain = _gain(*both)
    if gain is None:
        return
    one, ours, found, seeds, ahead = gain
    if unit == "%":
        one, ours, ahead = float(np.exp(one)), float(np.exp(ours)), seeds - ahead
        found = Difference(100 * np.expm1(found.value), 100 * np.exp(found.value) * found.error)
    yield Gain(where, linear, one, ours, found, seeds, ahead, unit, part)


def text_gains(rows: Sequence[dict]) -> Iterator[Gain]:
    """Perplexity in percent: at the trained length, in its last quarter, and at four times it."""
    places: dict[str, Value] = {
        "perplexity, 8K, trained length": lambda row: fmean(row["test"]) if "test" in row else None,
        "perplexity, 8K, last quarter": lambda row: fmean(row["test"][-4:]) if "test" in row else None,
        "perplexity, 32K, behind the trained length": lambda row: fmean(row["far"][4:]) if "far" in row else None,
    }
    for where, value in places.items():
        for part in PARTS:
            for linear in LINEAR:
                yield from text_gain(rows, where, linear, part, value, "%")


def needle_gains(rows: Sequence[dict]) -> Iterator[Gain]:
    """Percent of exact answers by kind, a mean over lengths up to the trained one, and beyond it."""
    for kind in ("1 key", "4 keys", "16 keys", "64 keys", "4 values"):
        for where, inside in (("to 8K", True), ("16K to 64K", False)):
            value = partial(needles_found, kind=kind, inside=inside)
            for part in PARTS:
                for linear in LINEAR:
                    yield from text_gain(rows, f"needles, {kind}, {where}", linear, part, value, "points")


def needles_found(row: dict, kind: str, inside: bool, suffix: str = "") -> float | None:
    """Percent of exact answers, a mean over lengths up to 8,192 or beyond. suffix: of names in rows."""
    contexts = [1024 << i for i in range(7)]
    names = [f"{kind} {context}{suffix}" for context in contexts if (context <= 8192) == inside]
    found = [row["needles"][name] for name in names if name in row.get("needles", {})]
    return 100 * fmean(found) if found else None


def _gain(linear: dict[int, float], ours: dict[int, float]) -> tuple[float, float, Difference, int, int] | None:
    """Means, difference, seeds that both have, and seeds with which ours is higher; None below three."""
    seeds = sorted(linear.keys() & ours.keys())
    if len(seeds) < 3:
        return None
    one, other = (np.array([values[seed] for seed in seeds]) for values in (linear, ours))
    return float(one.mean()), float(other.mean()), paired(other, one), len(seeds), int((other > one).sum())


def start_lines(rows: Sequence[dict]) -> list[str]:
    """A table of where λ starts: difference to the linear twin for each start, by kind and pair."""
    named = {start: {(gain.where, gain.pair): gain for gain in recall_gains(rows, start)} for start in STARTS}
    lines = []
    for key in dict.fromkeys(key for gains in named.values() for key in gains):
        found = [named[start].get(key) for start in STARTS]
        if sum(gain is not None for gain in found) > 1:
            lines.append([*key, *("" if gain is None else gain.shown for gain in found)])
    return table(["where", "pair", *STARTS], lines, words=2) if lines else []


def bucket_lines(rows: Sequence[dict]) -> list[str]:
    """Weights that see the bucket against λ alone, on the same sequences: a line for each kind and rule."""
    found, lines = {cell_of(row["cell"]): row for row in rows}, []
    for kind, where in KINDS.items():
        for linear in LINEAR:
            plain = shares(Arm(kind, f"Log-Linear {linear}", "one"), found)
            for rule in ("probe", "norm"):
                gain = _gain(plain, shares(Arm(kind, f"Log-Linear {linear}, {rule}", "one"), found))
                if gain is not None:
                    lines.append([where, f"Log-Linear {linear}", rule, f"{gain[0]:.1f}", f"{gain[1]:.1f}",
                                  f"{difference(gain[2], 1)} points", f"{gain[4]} of {gain[3]}"])  # fmt: skip
    return (
        table(["where", "model", "rule", "λ alone", "with the bucket", "difference", "ahead"], lines, 3)
        if lines
        else []
    )


def untrained_lines(rows: Sequence[dict]) -> list[str]:
    """Levels that no training sequence has, read as the last trained one and as they are: one line a model and recipe."""
    lines = []
    for part in PARTS:
        for linear in LINEAR:
            mixer = f"log_linear_{MODELS[linear]}"
            for label, kind in (("1 key", "1 key"), ("4 keys", "4 keys")):
                both = [
                    text_values(
                        rows, mixer, "one", part, partial(needles_found, kind=kind, inside=False, suffix=suffix)
                    )
                    for suffix in (" as they are", "")
                ]
                gain = _gain(*both)
                if gain is not None and max(gain[:2]) >= LEAST:
                    lines.append(
                        [f"needles, {label}, 16K to 64K ({SHORT[part]})", f"Log-Linear {linear}", f"{gain[0]:.1f}%",
                         f"{gain[1]:.1f}%", f"{difference(gain[2], 1)} points"]
                    )  # fmt: skip
            far = [
                text_values(
                    rows, mixer, "one", part, lambda row, name=name: fmean(row[name][4:]) if name in row else None
                )
                for name in ("far_as_they_are", "far")
            ]
            gain = _gain(*far)
            if gain is not None:
                lines.append(
                    [f"loss, 32K, behind the trained length ({SHORT[part]})", f"Log-Linear {linear}", f"{gain[0]:.4f}",
                     f"{gain[1]:.4f}", f"{difference(gain[2], 4)} nats"]
                )  # fmt: skip
    return table(["where", "model", "as they are", "as the last trained", "difference"], lines, 2) if lines else []


def gains(recall: Sequence[dict], text: Sequence[dict]) -> list[Gain]:
    """All comparisons that have rows, with λ that starts at 1."""
    return [*recall_gains(recall), *text_gains(text), *needle_gains(text)]


def opening(recall: Sequence[dict], text: Sequence[dict], more: Sequence[str] = (), said: str = "") -> list[str]:
    """Lines of the page: figure, table, when to use levels, and then ``more``. Empty without rows. said: by hand."""
    found = gains(recall, text)
    if not found:
        return []
    headers = ["where", "twin", "linear", "log-linear", "difference", "ahead", "verdict", "the paper"]
    learned = [gain for gain in found if gain.learned]
    lines = [
        "![Gains of levels by task](figures/levels_add.svg)",
        "",
        "Log-linear minus linear, mean and standard error over seeds; models of one seed saw the same data in the same order. "
        "Recall and needles are percent of exact answers, a mean over numbers of pairs or lengths. The linear and log-linear "
        "columns of perplexity are perplexities. *Ahead* counts seeds. A difference beyond "
        f"{ERRORS} standard errors is called better or worse. λ starts at 1.",
        "",
        *table(headers, [gain.cells() for gain in learned], words=2),
        "",
        "Recall: two layers of width 32, T = 512 (`experiments/recall_plan.py`). Language models: a million parameters, 29M "
        "tokens of C files (`experiments/text_stacks.py`). "
        + " ".join(f"{SHORT[part].capitalize()}: {text_}." for part, text_ in PARTS.items()),
        "",
        *_not_learned(found),
        "## When to use it, what to set",
        "",
        *verdict_lines(learned),
        *([said, ""] if said else []),
    ]
    for title, made in (
        ("Levels that no training sequence has, read as they are and as the last trained one:", untrained_lines(text)),
        ("Difference to the linear twin by the start of λ (`level_scale_start`):", start_lines(recall)),
        ("Weights that see the bucket, `λ · s(q, S)` (`experiments/bucket_weights.py`):", bucket_lines(recall)),
    ):
        lines += [title, "", *made, ""] if made else []
    return [*lines, *more]


def _not_learned(found: Sequence[Gain]) -> list[str]:
    some = [f"{gain.name} ({gain.pair})" for gain in found if not gain.learned]
    return [f"Learned by neither twin (below {LEAST:.0f}%), so not compared: {'; '.join(some)}.", ""] if some else []


def verdict_lines(learned: Sequence[Gain]) -> list[str]:
    lines = []
    for word in ("better", "worse"):
        some = [f"{gain.name} ({gain.pair}, {gain.shown})" for gain in learned if gain.verdict == word]
        found = f": {'; '.join(some)}" if some else ""
        lines.append(f"- **Log-linear is {word}** in {len(some)} of {len(learned)} comparisons of the table{found}.")
    undecided = sum(gain.verdict == "undecided" for gain in learned)
    return [
        *lines,
        f"- **Undecided** are {undecided} of {len(learned)}: their differences are within {ERRORS} standard errors.",
        "",
    ]


@styled
def draw(found: Sequence[Gain], path: Path) -> list[Path]:
    """Differences that are good for log-linear point right; bars are standard errors."""
    learned = [gain for gain in found if gain.learned]
    clear = sum(gain.verdict == "better" for gain in learned)
    title = f"Levels help beyond {ERRORS} standard errors in {clear} of {len(learned)} comparisons of paired seeds"
    wheres = [list(dict.fromkeys(gain.name for gain in learned if gain.unit == unit)) for unit in ("points", "%")]
    labels = ("points of exact answers", "percent of perplexity saved")
    shown = [(some, label) for some, label in zip(wheres, labels) if some]
    rows = max(len(some) for some, _ in shown)
    figure, panels = canvas(title, (1, len(shown)), (3.0, 0.32 * rows + 0.4), left=3.9, gaps=(4.1, 0.4))
    for panel, (some, label) in zip(panels[0], shown):
        for gain in learned:
            if gain.name in some:
                offset = 0.14 if gain.pair == "Mamba-2" else -0.14
                sign, color = -1 if gain.unit == "%" else 1, COLORS[f"Log-Linear {gain.pair}"]
                place = -some.index(gain.name) + offset
                panel.errorbar(sign * gain.difference.value, place, xerr=gain.difference.error, fmt="o", color=color)
        panel.axvline(0, color=INK, linewidth=0.8)
        panel.set_yticks([-i for i in range(len(some))], some, fontsize=8)
        panel.set_ylim(-len(some) + 0.4, 0.6)
        panel.set_xlabel(label)
    for place, pair in enumerate(LINEAR):
        panels[0][0].text(0.99, 0.02 + 0.07 * place, pair, color=COLORS[f"Log-Linear {pair}"], ha="right",
                          transform=panels[0][0].transAxes, fontsize=9)  # fmt: skip
    return save(figure, path)
