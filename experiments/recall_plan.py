"""The plan of the recall grid: arms in the order in which they run. It was written before any of its rows.

An arm is a model on a kind of recall at a width. A stack of three rates and three seeds of their own chooses the arm's rate,
by sequences held out for it. A stack of nine fresh seeds at that rate is what is reported. Arms of one kind and width share
the seeds, and so the same sequences in the same order. GPU time comes in minutes, so each phase is whole by itself: sweeps,
then fresh seeds. One change came after the first sweeps: no model had learned "end", so its fresh seeds went to the last phase.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean

from loglinear.fenwick import num_levels
from loglinear.tasks.mqar.config import PRESETS, Cell, Recipe

LINEAR = ("Mamba-2", "Gated DeltaNet")
LENGTH, STATE_SIZE, PAIRS = 512, 16, (32, 64, 128)
RATES, SWEEP_SEEDS, FRESH_SEEDS = (0.005, 0.01, 0.02), (100, 101, 102), tuple(range(9))
# The recipe of the committed grid with twice the steps and as many tokens in all, within a tenth.
RECIPE = replace(PRESETS["full"].recipe, steps=8000, batch_tokens=36 * LENGTH)


@dataclass(frozen=True)
class Arm:
    """One model on one kind of recall.

    Attributes:
        model: a name of ``MODELS``; with ", norm" or ", probe" its weights see the bucket (``bucket_weights``).
        start: where λ starts. matched: whether a linear model has one state as large as all states of its twin together.
    """

    kind: str
    model: str
    start: str = "noise"
    width: int = 32
    matched: bool = False

    def cell(self, rate: float, seed: int) -> Cell:
        state_size = STATE_SIZE * (num_levels(LENGTH) if self.matched else 1)
        return Cell(self.model, self.width, state_size, LENGTH, PAIRS, rate, seed, RECIPE, self.kind, self.start)


def phases() -> list[list[Arm]]:
    """Arms that run together, the most telling first."""
    kinds = ("any", "latest-newest", "tagged", "first", "latest-first", "end")

    def pairs(of: tuple[str, ...], width: int = 32) -> list[Arm]:
        return [
            arm
            for kind in of
            for linear in LINEAR
            for arm in (Arm(kind, linear, width=width), Arm(kind, f"Log-Linear {linear}", "one", width))
        ]

    def starts(of: tuple[str, ...]) -> list[Arm]:
        return [Arm(kind, f"Log-Linear {one}", start) for kind in of for one in LINEAR for start in ("noise", "paper")]

    return [
        pairs(kinds[:1]),
        pairs(kinds[1:2]),
        starts(kinds[:1]),
        pairs(kinds[2:4]),
        starts(kinds[1:4]),
        [Arm(kind, linear, matched=True) for kind in kinds[:4] for linear in LINEAR],
        [*pairs(kinds[4:]), *starts(kinds[4:])],
        pairs(kinds[:4], 64),
        [Arm(kind, linear, matched=True) for kind in kinds[4:] for linear in LINEAR],
    ]


def wanted(rows: dict[Cell, dict]) -> Iterator[tuple[Cell, ...]]:
    """Stacks without rows: of each phase the sweeps, and the fresh seeds of arms whose sweep is done."""
    for arms in phases():
        yield from (sweep(arm) for arm in arms if best_rate(arm, rows) is None)
        for arm in arms:
            rate = best_rate(arm, rows)
            if rate is not None and any(cell not in rows for cell in fresh(arm, rate)):
                yield fresh(arm, rate)


def sweep(arm: Arm) -> tuple[Cell, ...]:
    return tuple(arm.cell(rate, seed) for rate in RATES for seed in SWEEP_SEEDS)


def fresh(arm: Arm, rate: float) -> tuple[Cell, ...]:
    return tuple(arm.cell(rate, seed) for seed in FRESH_SEEDS)


def best_rate(arm: Arm, rows: dict[Cell, dict]) -> float | None:
    """The rate with the best mean of the validation accuracy over pairs and sweep seeds; None until all have rows."""
    if any(cell not in rows for cell in sweep(arm)):
        return None

    def validation(rate: float) -> tuple[float, float]:
        found = [rows[arm.cell(rate, seed)] for seed in SWEEP_SEEDS]
        return fmean(fmean(row["validation"].values()) for row in found), -fmean(row["final_loss"] for row in found)

    return max(RATES, key=validation)


def cell_of(identity: dict) -> Cell:
    """The cell that ``Cell.identity`` gave."""
    return Cell(**{**identity, "pairs": tuple(identity["pairs"]), "recipe": Recipe(**identity["recipe"])})
