"""The plan of the recall grid: arms in the order in which they run. It was written before any of its rows.

An arm is a model on a kind of recall at a width. Fresh seeds are what is reported. Arms of one kind and width share them, and
so the same sequences in the same order. They run first at the rate that was best for both forms of Mamba-2 and of Gated
DeltaNet at this width and length in the committed grid, because GPU time comes in minutes. A sweep over rates, with seeds of
its own and sequences held out for it, follows. Where it finds another rate, the fresh seeds run again at that rate, and
replace the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean

from loglinear.fenwick import num_levels
from loglinear.tasks.mqar.config import PRESETS, Cell, Recipe

LENGTH, STATE_SIZE, PAIRS = 512, 16, (32, 64, 128)
RATES, PRIOR_RATE = (0.005, 0.01, 0.02), 0.01
SWEEP_SEEDS, FRESH_SEEDS = (100, 101), tuple(range(8))
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
    kinds = ("any", "end", "tagged", "latest-first", "latest-newest", "first")
    mamba, ours = "Mamba-2", "Log-Linear Mamba-2"
    delta, ours_delta = "Gated DeltaNet", "Log-Linear Gated DeltaNet"

    def pairs(linear: str, width: int = 32, of: tuple[str, ...] = kinds) -> list[Arm]:
        return [
            arm
            for kind in of
            for arm in (Arm(kind, linear, width=width), Arm(kind, f"Log-Linear {linear}", "one", width))
        ]

    return [
        pairs(mamba, of=kinds[:2]),
        [Arm(kind, f"{ours}, probe", "one") for kind in kinds[:2]],
        pairs(mamba, of=kinds[2:4]),
        pairs(mamba, of=kinds[4:]),
        [Arm(kind, f"{ours}, norm", "one") for kind in kinds[:2]],
        [Arm(kind, ours, start) for start in ("noise", "paper") for kind in kinds[:2]],
        pairs(delta),
        [Arm(kind, mamba, matched=True) for kind in kinds[:2]],
        [Arm(kind, ours, start) for start in ("noise", "paper") for kind in kinds[2:]],
        [Arm(kind, f"{ours_delta}, probe", "one") for kind in kinds[:2]],
        [Arm(kind, ours_delta, start) for start in ("noise", "paper") for kind in kinds],
        [
            Arm(kind, linear, matched=True)
            for linear in (mamba, delta)
            for kind in kinds
            if (linear, kind) not in [(mamba, kind) for kind in kinds[:2]]
        ],
        *(pairs(linear, 64) for linear in (mamba, delta)),
        *(pairs(linear) for linear in ("GLA", "KDA")),
    ]


def wanted(rows: dict[Cell, dict]) -> Iterator[Cell]:
    """Cells without a row: fresh seeds, then sweeps, and again fresh seeds at the rates that sweeps found."""
    for arms in phases():
        yield from (
            cell for seed in FRESH_SEEDS for arm in arms if (cell := arm.cell(best_rate(arm, rows), seed)) not in rows
        )
    for arms in phases():
        yield from (cell for arm in arms for cell in sweep(arm) if cell not in rows)


def sweep(arm: Arm) -> list[Cell]:
    return [arm.cell(rate, seed) for rate in RATES for seed in SWEEP_SEEDS]


def best_rate(arm: Arm, rows: dict[Cell, dict]) -> float:
    """The rate with the best mean of the validation accuracy over pairs and sweep seeds; the prior one until all have rows."""
    if any(cell not in rows for cell in sweep(arm)):
        return PRIOR_RATE

    def validation(rate: float) -> tuple[float, float]:
        found = [rows[arm.cell(rate, seed)] for seed in SWEEP_SEEDS]
        return fmean(fmean(row["validation"].values()) for row in found), -fmean(row["final_loss"] for row in found)

    return max(RATES, key=validation)


def cell_of(identity: dict) -> Cell:
    """The cell that ``Cell.identity`` gave."""
    return Cell(**{**identity, "pairs": tuple(identity["pairs"]), "recipe": Recipe(**identity["recipe"])})
