"""The section on multi-query associative recall: accuracy by pairs, and what was required of every cell."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass

from loglinear.tasks.mqar.config import FIRST_FIVE, MODELS
from loglinear.tasks.mqar.report import Result, results
from reporting.text import MISSING, NOT_RUN, Section, Verdict, picture, signed, table

GAIN = 0.05  # required wherever the linear model is within RANGE
RANGE = (0.2, 0.9)
TWINS = [(name.removeprefix("Log-Linear "), name) for name in FIRST_FIVE if name.startswith("Log-Linear ")]

CLAIM = (
    "The paper's claim: on associative recall, log-linear models stay accurate at lengths and numbers of pairs at which their "
    "linear twins fail."
)


@dataclass(frozen=True)
class Cell:
    """A log-linear model beside its linear twin: accuracies and standard deviations over seeds, for one number of pairs."""

    log_linear: str
    width: int
    length: int
    pairs: str
    linear: tuple[float, float]
    own: tuple[float, float]

    @property
    def gain(self) -> float:
        return self.own[0] - self.linear[0]

    @property
    def spread(self) -> float:
        """One standard deviation over seeds, pooled from the two models."""
        return ((self.linear[1] ** 2 + self.own[1] ** 2) / 2) ** 0.5

    @property
    def not_below(self) -> bool:
        return self.gain >= -self.spread

    @property
    def must_gain(self) -> bool:
        return RANGE[0] <= self.linear[0] <= RANGE[1]

    @property
    def gains(self) -> bool:
        return not self.must_gain or self.gain >= GAIN


def experiments(rows: list[dict]) -> list[tuple[dict, list[dict], list[Result]]]:
    """(recipe, rows, results) of each experiment, that with most rows first: other steps or pairs are another experiment."""
    groups = defaultdict(list)
    for row in rows:
        cell = row["cell"]
        share = [pairs / cell["length"] for pairs in cell["pairs"]]  # longer sequences have more in proportion
        groups[json.dumps([cell["recipe"], share], sort_keys=True)].append(row)
    names = list(MODELS)
    return [
        (
            json.loads(experiment)[0],
            group,
            sorted(results(group), key=lambda r: (r.length, r.width, names.index(r.model), r.state_size)),
        )
        for experiment, group in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


def grid_of(found: list[Result]) -> list[Result]:
    """The results with the narrowest keys of their size: the others are linear models with wider ones."""
    narrowest: dict[tuple[int, int], int] = {}
    for result in found:
        size = result.width, result.length
        narrowest[size] = min(result.state_size, narrowest.get(size, result.state_size))
    return [result for result in found if result.state_size == narrowest[result.width, result.length]]


def cells(found: list[Result]) -> list[Cell]:
    """Every log-linear result beside the linear one of the same widths, by number of pairs."""
    by_size = {(r.model, r.width, r.length, r.state_size): r for r in found}
    made = []
    for linear, log_linear in TWINS:
        for (model, *size), result in by_size.items():
            twin = by_size.get((linear, *size))
            if model == log_linear and twin is not None:
                counts = [pairs for pairs in result.accuracy if pairs != "mean" and pairs in twin.accuracy]
                made += [
                    Cell(log_linear, size[0], size[1], pairs, twin.accuracy[pairs], result.accuracy[pairs])
                    for pairs in counts
                ]
    return made


def section(rows: list[dict]) -> Section:
    """The whole section, "not run" where rows are missing."""
    made = Section("Multi-query associative recall", "associative recall", CLAIM)
    done = experiments(rows)
    compared = cells(grid_of(done[0][2])) if done else []
    made.verdicts += [verdict for _, log_linear in TWINS for verdict in verdicts(log_linear, compared)]
    if not done:
        made.add(NOT_RUN)
    for number, (recipe, group, found) in enumerate(done):
        grid = grid_of(found)
        made.add(_recipe(recipe, group))
        for length in sorted({result.length for result in grid}):
            made.add(
                f"Share of values recalled at length {length:,}, mean ± standard deviation over seeds, in percent:"
            )
            made.add(_accuracy([result for result in grid if result.length == length], _rates(group)))
        made.add(*_required(cells(grid)))
        matched = matched_states(found)
        if matched:
            made.add("At a fixed total state (linear with keys so much wider that its one state is as large):")
            made.add(_matched_table(matched), [f"- {line}" for line in _matched_sentences(matched)])
        if number == 0:
            made.add(picture("mqar", "Accuracy against pairs"))
            if matched:
                made.add(picture("mqar_matched", "Accuracy against pairs at a fixed total state"))
    return made


def verdicts(log_linear: str, compared: list[Cell]) -> list[Verdict]:
    """The requirements of a log-linear model, over the cells that were run."""
    own = [cell for cell in compared if cell.log_linear == log_linear]
    linear = log_linear.removeprefix("Log-Linear ")
    names = (
        f"{log_linear}: at or above {linear} within one standard deviation in every cell of associative recall",
        f"{log_linear}: at least 5 points above {linear} wherever that is between 20% and 90%",
    )
    if not own:
        return [Verdict(name, MISSING, "") for name in names]
    asked = [cell for cell in own if cell.must_gain]
    result = "no such cell" if not asked else "met" if all(cell.gains for cell in asked) else "not met"
    kept, gained = sum(cell.not_below for cell in own), sum(cell.gains for cell in asked)
    return [
        Verdict(names[0], "met" if kept == len(own) else "not met", f"{kept} of {len(own)} cells"),
        Verdict(names[1], result, f"{gained} of {len(asked)} such cells"),
    ]


def _recipe(recipe: dict, rows: list[dict]) -> str:
    rates = _rates(rows)
    devices = sorted({row["device"] for row in rows if "device" in row})
    layers = "1 layer" if recipe["layers"] == 1 else f"{recipe['layers']} layers"
    return (
        f"{layers}, {recipe['steps']:,} steps of {recipe['batch_tokens']:,} tokens, vocabulary "
        f"{recipe['vocab_size']:,}, learning rate out of {', '.join(f'{rate:g}' for rate in rates)} for each model by "
        f"validation accuracy with the first seed (* at the edge of these); {len(rows)} models trained"
        f"{' on ' + ', '.join(devices) if devices else ''}; commit {', '.join(sorted({row['commit'] for row in rows}))}."
    )


def _rates(rows: list[dict]) -> list[float]:
    return sorted({row["cell"]["learning_rate"] for row in rows})


def _accuracy(found: list[Result], rates: list[float]) -> list[str]:
    counts = sorted({pairs for result in found for pairs in result.accuracy if pairs != "mean"}, key=int)
    lines = []
    for result in found:
        values = (result.accuracy.get(pairs) for pairs in (*counts, "mean"))
        shown = ["" if value is None else f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}" for value in values]
        edge = "*" if len(rates) > 1 and result.learning_rate in (rates[0], rates[-1]) else ""
        lines.append([result.model, str(result.width), f"{result.learning_rate:g}{edge}", str(result.seeds), *shown])
    return table(["model", "width", "learning rate", "seeds", *(f"{pairs} pairs" for pairs in counts), "mean"], lines)


def _required(compared: list[Cell]) -> list[str | list[str]]:
    """Every cell as "linear → log-linear", and those that fall short of what is required, by name."""
    if not compared:
        return ["Log-linear beside linear: not run."]
    counts = sorted({cell.pairs for cell in compared}, key=int)
    groups: dict[tuple[str, int, int], dict[str, Cell]] = defaultdict(dict)
    for cell in compared:
        groups[cell.log_linear, cell.length, cell.width][cell.pairs] = cell
    lines = [
        [f"{name}, length {length}, width {width}", *(_shown(group.get(pairs)) for pairs in counts)]
        for (name, length, width), group in groups.items()
    ]
    text = (
        "Required of every cell: log-linear not below linear by more than one standard deviation over seeds (pooled from both "
        "models), and at least 5 points above wherever linear is between 20% and 90%. Linear → log-linear in percent; "
        "**bold** is short of it:"
    )
    below = [cell for cell in compared if not cell.not_below]
    short = [cell for cell in compared if not cell.gains]
    asked = sum(cell.must_gain for cell in compared)
    sentences = [
        f"- Not below by more than one standard deviation: {len(compared) - len(below)} of {len(compared)} cells."
        + "".join(f" Short: {_named(cell)}." for cell in below),
        f"- At least 5 points above where linear is between 20% and 90%: {asked - len(short)} of {asked} cells."
        + "".join(f" Short: {_named(cell)}." for cell in short),
    ]
    return [text, table(["", *(f"{pairs} pairs" for pairs in counts)], lines), sentences]


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = f"{100 * cell.linear[0]:.1f} → {100 * cell.own[0]:.1f}"
    return text if cell.not_below and cell.gains else f"**{text}**"


def _named(cell: Cell) -> str:
    gain = f"{signed(100 * cell.gain, 1)} points, one standard deviation {100 * cell.spread:.1f}"
    return f"{cell.log_linear}, width {cell.width}, length {cell.length}, {cell.pairs} pairs ({gain})"


def matched_states(found: list[Result]) -> list[tuple[Result, Result]]:
    """(log-linear, linear) of one width and length where the linear model's state is as large as all states together."""
    made = []
    for linear, log_linear in TWINS:
        for result in (r for r in found if r.model == log_linear):
            same = [r for r in found if (r.model, r.width, r.length) == (linear, result.width, result.length)]
            equal = [r for r in same if r.state_floats == result.state_floats]
            made += [(result, twin) for twin in equal]
    return made


def _matched_table(matched: list[tuple[Result, Result]]) -> list[str]:
    lines = []
    for pair in matched:
        for result in pair:
            mean, spread = result.accuracy["mean"]
            size = [str(result.width), str(result.length), str(result.state_size), f"{result.state_floats:,}"]
            lines.append([result.model, *size, str(result.seeds), f"{100 * mean:.1f} ± {100 * spread:.1f}"])
    return table(["model", "width", "length", "K", "numbers in a layer's state", "seeds", "mean over pairs"], lines)


def _matched_sentences(matched: list[tuple[Result, Result]]) -> list[str]:
    lines = []
    for result, twin in matched:
        (own, own_spread), (other, spread) = result.accuracy["mean"], twin.accuracy["mean"]
        pooled = ((own_spread**2 + spread**2) / 2) ** 0.5
        said = (
            "within one standard deviation of" if abs(own - other) <= pooled else ("above" if own > other else "below")
        )
        lines.append(
            f"{result.model}, width {result.width}, length {result.length}: {said} {twin.model} with K {twin.state_size} "
            f"({signed(100 * (own - other), 1)} points, one standard deviation {100 * pooled:.1f})."
        )
    return lines
