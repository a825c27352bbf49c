"""The plan of the recall grid: arms in the order in which they run. It was written before any of its rows.

An arm is a model on a kind of recall at a width. A stack of three rates and three seeds of their own chooses a model's rate on
"any", by sequences held out for it. A stack of nine fresh seeds at that rate is what is reported. Arms of one kind and width
share the seeds, and so the same sequences in the same order. GPU time comes in minutes, so each phase is whole by itself.

Three changes came after the first sweeps, which were of "any" and "end", and before any fresh seed. A model keeps its rate of
"any" on the other kinds, whatever λ starts from; each kind had a sweep of its own. No model had learned "end", so it went to
the last phase, and the kinds that ask at the end have fewer pairs. "first" went to the second phase: the paper has figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean

from loglinear.fenwick import num_levels
from loglinear.tasks.mqar.config import PRESETS, Cell, Recipe

LINEAR = ("Mamba-2", "Gated DeltaNet")
LENGTH, STATE_SIZE, PAIRS = 512, 16, (32, 64, 128)
FEWER = {"tagged": (8, 16, 32), "end": (8, 16, 32), "latest-newest": (16, 32, 64), "latest-first": (16, 32, 64)}
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
        return Cell(
            self.model,
            self.width,
            state_size,
            LENGTH,
            FEWER.get(self.kind, PAIRS),
            rate,
            seed,
            RECIPE,
            self.kind,
            self.start,
        )


def phases() -> list[list[Arm]]:
    """Arms that run together, the most telling first."""
    kinds = ("any", "first", "tagged", "latest-newest", "latest-first", "end")

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
        pairs(kinds[2:3]),
        starts(kinds[:1]),
        pairs(kinds[3:4]),
        starts(kinds[1:4]),
        [Arm(kind, linear, matched=True) for kind in kinds[:4] for linear in LINEAR],
        [*pairs(kinds[4:]), *starts(kinds[4:])],
        [Arm(kind, f"Log-Linear Mamba-2, {rule}", "one") for kind in ("any", "end") for rule in ("probe", "norm")],
        pairs(kinds[:4], 64),
        [Arm(kind, linear, matched=True) for kind in kinds[4:] for linear in LINEAR],
    ]


def chooser(arm: Arm) -> Arm:
    """The arm whose sweep chooses the rate: the same model on "any", with λ from 1."""
    model = arm.model.partition(", ")[0]
    return replace(arm, kind="any", model=model, start="one" if model.startswith("Log-Linear") else arm.start)


def wanted(rows: dict[Cell, dict]) -> Iterator[tuple[Cell, ...]]:
    """Stacks without rows: of each phase the sweeps, and the fresh seeds of arms whose sweep is done."""
    swept: set[Arm] = set()
    for arms in phases():
        for arm in dict.fromkeys(map(chooser, arms)):
            if arm not in swept and best_rate(arm, rows) is None:
                swept.add(arm)
                yield sweep(arm)
        for arm in arms:
            rate = best_rate(arm, rows)
            if rate is not None and any(cell not in rows for cell in fresh(arm, rate)):
                yield fresh(arm, rate)


def sweep(arm: Arm) -> tuple[Cell, ...]:
    return tuple(arm.cell(rate, seed) for rate in RATES for seed in SWEEP_SEEDS)


def fresh(arm: Arm, rate: float) -> tuple[Cell, ...]:
    return tuple(arm.cell(rate, seed) for seed in FRESH_SEEDS)


def best_rate(arm: Arm, rows: dict[Cell, dict]) -> float | None:
    """The rate at which its ``chooser`` has the best mean accuracy over pairs and sweep seeds; None until all have rows.

    Accuracy is that of the validation.
    """
    arm = chooser(arm)
    if any(cell not in rows for cell in sweep(arm)):
        return None

    def validation(rate: float) -> tuple[float, float]:
        found = [rows[arm.cell(rate, seed)] for seed in SWEEP_SEEDS]
        return fmean(fmean(row["validation"].values()) for row in found), -fmean(row["final_loss"] for row in found)

    return max(RATES, key=validation)


def cell_of(identity: dict) -> Cell:
    """The cell that ``Cell.identity`` gave."""
    return Cell(**{**identity, "pairs": tuple(identity["pairs"]), "recipe": Recipe(**identity["recipe"])})
