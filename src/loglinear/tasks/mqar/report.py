"""The report of a run: learning rates, accuracy with its spread over seeds, verdicts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import mean, stdev


@dataclass(frozen=True)
class Result:
    """One line of the table: a model at one size, over its seeds at its best learning rate."""

    model: str
    width: int
    length: int
    state_size: int
    state_floats: int | None
    learning_rate: float
    by_seed: dict[int, dict[str, float]]
    """Share of the test's values recalled with each seed: by number of pairs, then "mean" over them."""

    @property
    def seeds(self) -> int:
        return len(self.by_seed)

    @property
    def accuracy(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation over seeds, with the keys of ``by_seed``."""
        columns = {
            pairs: [shares[pairs] for shares in self.by_seed.values()] for pairs in next(iter(self.by_seed.values()))
        }
        return {p: (mean(values), stdev(values) if len(values) > 1 else 0.0) for p, values in columns.items()}

    @property
    def label(self) -> str:
        return self.model if self.state_floats is None else f"{self.model}, K {self.state_size}"


def validation_accuracy(row: dict) -> float:
    """Mean over the numbers of pairs."""
    return mean(row["validation"].values())


def best_rate(rows: list[dict]) -> float:
    """The learning rate of the row with the best validation accuracy.

    Among equal rows, as at chance, the lowest loss decides.
    """
    best = max(rows, key=lambda row: (validation_accuracy(row), -row["final_loss"]))
    return best["cell"]["learning_rate"]


def results(rows: list[dict]) -> list[Result]:
    """One result for each model and size in ``rows``, in their order.

    The learning rate is chosen among the rows of the first seed that has several, on the validation sequences.
    """
    sizes = defaultdict(list)
    for row in rows:
        cell = row["cell"]
        sizes[cell["model"], cell["width"], cell["length"], cell["state_size"]].append(row)
    found = []
    for (model, width, length, state_size), group in sizes.items():
        first_seed = min(row["cell"]["seed"] for row in group)
        rate = best_rate([row for row in group if row["cell"]["seed"] == first_seed])
        by_seed = {
            row["cell"]["seed"]: {**row["test"], "mean": mean(row["test"].values())}
            for row in group
            if row["cell"]["learning_rate"] == rate
        }
        found.append(Result(model, width, length, state_size, group[0]["state_floats"], rate, by_seed))
    return found


def verdicts(found: list[Result]) -> list[str]:
    """Each log-linear model beside its linear twin of the same widths, and beside a twin whose state is as large or larger."""
    linear = {(r.model, r.width, r.length, r.state_size): r for r in found}
    lines = []
    for result in found:
        twin_name = result.model.removeprefix("Log-Linear ")
        if twin_name == result.model or result.state_floats is None:
            continue
        twin = linear.get((twin_name, result.width, result.length, result.state_size))
        if twin is not None:
            lines.append(_compare(result, twin, "the same widths"))
        larger = [
            other
            for (name, width, length, _), other in linear.items()
            if (name, width, length) == (twin_name, result.width, result.length)
            and (other.state_floats or 0) >= result.state_floats
        ]
        if larger:
            lines.append(_compare(result, min(larger, key=lambda r: r.state_floats or 0), "at least the same state"))
    return lines


def widest_spread(found: list[Result]) -> str | None:
    """A sentence on the result whose seeds differ most; None where no result has two seeds."""
    several = [(sorted(shares["mean"] for shares in r.by_seed.values()), r) for r in found if r.seeds > 1]
    if not several:
        return None
    (least, *_, most), result = max(several, key=lambda pair: pair[0][-1] - pair[0][0])
    return (
        f"One seed says little: {result.label}, width {result.width}, length {result.length}, recalls {least:.2f} with "
        f"one seed and {most:.2f} with another."
    )


def _compare(one: Result, other: Result, condition: str) -> str:
    (a, spread_a), (b, spread_b) = one.accuracy["mean"], other.accuracy["mean"]
    where = f"width {one.width}, length {one.length}"
    numbers = (
        f"{one.model} {a:.3f} ± {spread_a:.3f} (K {one.state_size}, {one.state_floats:,} numbers a layer), "
        f"{other.model} {b:.3f} ± {spread_b:.3f} (K {other.state_size}, {other.state_floats:,})"
    )
    both = one.by_seed.keys() & other.by_seed.keys()
    ahead = sum(one.by_seed[seed]["mean"] > other.by_seed[seed]["mean"] for seed in both)
    numbers += f"; {one.model} ahead with {ahead} of {len(both)} seeds"
    # Twice the standard error of a difference of means. One seed has no standard error.
    seeds = min(one.seeds, other.seeds)
    error = ((spread_a**2 + spread_b**2) / seeds) ** 0.5
    if seeds < 2 or abs(a - b) <= 2 * error:
        outcome = "no winner"
    else:
        outcome = f"{one.model if a > b else other.model} is better"
    return f"{where}, {condition}: {outcome}. {numbers}"
