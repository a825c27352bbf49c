"""Tables of the recall grid: accuracy of each arm over fresh seeds, and differences of pairs that saw the same sequences."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev

from loglinear.tasks.mqar.config import Cell
from loglinear.tasks.mqar.run import read_rows
from recall_plan import FRESH_SEEDS, Arm, best_rate, cell_of, phases


def lines(rows: dict[Cell, dict]) -> Iterator[str]:
    """A line for each arm that has fresh seeds, and one for each difference to its linear twin or to plain λ."""
    found = {arm: shares(arm, rows) for arms in phases() for arm in arms}
    for arm, by_seed in found.items():
        if not by_seed:
            continue
        means = " ".join(f"{100 * fmean(column):5.1f}" for column in zip(*by_seed.values()))
        whole = [100 * fmean(row) for row in by_seed.values()]
        yield f"{name(arm)}: rate {best_rate(arm, rows):g}, {len(whole)} seeds, by pairs {means}, mean {plus_minus(whole)}"
        for twin in twins(arm):
            both = sorted(by_seed.keys() & found.get(twin, {}).keys())
            if both:
                apart = [100 * (fmean(by_seed[seed]) - fmean(found[twin][seed])) for seed in both]
                ahead = sum(x > 0 for x in apart)
                yield f"    minus {name(twin)}: {plus_minus(apart)} points, ahead with {ahead} of {len(both)}"


def shares(arm: Arm, rows: dict[Cell, dict]) -> dict[int, list[float]]:
    """Share recalled by number of pairs, for each fresh seed that has a row."""
    rate = best_rate(arm, rows)
    cells = {} if rate is None else {seed: arm.cell(rate, seed) for seed in FRESH_SEEDS}
    return {seed: list(rows[cell]["test"].values()) for seed, cell in cells.items() if cell in rows}


def twins(arm: Arm) -> list[Arm]:
    """The arms that an arm is compared with: the linear model, and the log-linear one whose weights see no bucket."""
    model, _, rule = arm.model.partition(", ")
    if not model.startswith("Log-Linear"):
        return []
    linear = Arm(arm.kind, model.removeprefix("Log-Linear "), width=arm.width)
    return [linear, Arm(arm.kind, model, arm.start, arm.width)] if rule else [linear]


def name(arm: Arm) -> str:
    return f"{arm.kind}, width {arm.width}, {arm.model}" + (
        f", {arm.start}" if arm.model.startswith("Log-Linear") else ", matched state" * arm.matched
    )


def plus_minus(values: list[float]) -> str:
    """Mean and standard error."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{fmean(values):.1f} ± {error:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    rows = {cell_of(row["cell"]): row for path in parser.parse_args().files for row in read_rows(path)}
    for line in lines(rows):
        print(line)


if __name__ == "__main__":
    main()
