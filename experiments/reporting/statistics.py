"""Differences between models on the same sequences, and when one of them counts.

Two models read the same validation sequences, and sequences differ far more than models do. Differences are therefore taken
sequence by sequence. The standard error of a difference is the standard error of the mean over sequences. A difference counts
if it is further from 0 than two standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """A mean difference and its standard error."""

    value: float
    error: float

    @property
    def sign(self) -> int:
        """-1 or 1 if the difference counts, 0 if it does not."""
        return 0 if abs(self.value) <= 2 * self.error else int(math.copysign(1, self.value))


def paired(first: np.ndarray, second: np.ndarray) -> Difference:
    """``first - second``, both ``[sequences]``."""
    differences = np.asarray(first, float) - np.asarray(second, float)
    error = differences.std(ddof=1) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return Difference(float(differences.mean()), float(error))


def outcome(differences: Sequence[Difference]) -> int:
    """-1 or 1 if the difference counts, with one sign, in every one of the seeds; 0 otherwise."""
    signs = {difference.sign for difference in differences}
    return signs.pop() if len(signs) == 1 else 0


def sequence_losses(evaluation: dict, first: int = 0) -> np.ndarray:
    """Mean loss of each sequence over the positions from ``first`` on, ``[sequences]``; ``first`` is an edge of buckets."""
    edges, losses = np.array(evaluation["per_sequence"]["edges"]), np.array(evaluation["per_sequence"]["losses"])
    kept = edges[:-1] >= first
    return np.average(losses[:, kept], axis=1, weights=np.diff(edges)[kept])


def edge_at(evaluation: dict, position: int) -> int | None:
    """The first edge of buckets at or behind ``position``, None if there is no position behind it."""
    return next((edge for edge in evaluation["per_sequence"]["edges"][:-1] if edge >= position), None)


def check_same_sequences(evaluations: Sequence[dict]) -> None:
    """Raise ValueError unless all are of the same sequences, as only those can be compared one by one."""
    kinds = {tuple(e[name] for name in ("hash", "context", "packing", "sequences")) for e in evaluations}
    if len(kinds) > 1:
        raise ValueError(f"rows: evaluated on different sequences (hash, context, packing, number): {sorted(kinds)}")


@dataclass(frozen=True)
class Repeats:
    """Loss on repeated tokens further than some distance away: sums in nats and counts, each ``[sequences]``."""

    sums: np.ndarray
    counts: np.ndarray

    @property
    def loss(self) -> float:
        return float(self.sums.sum() / self.counts.sum())

    def without(self, sequence: int) -> Repeats:
        return Repeats(np.delete(self.sums, sequence), np.delete(self.counts, sequence))


def repeats_beyond(evaluations: Sequence[dict], distance: int) -> Repeats | None:
    """Repeats at ``distance`` and further, a mean over evaluations (seeds of one model); None if there are none."""
    ranges = [[r for r in e["repeats"] if r["first"] >= distance and r["repeated_tokens"]] for e in evaluations]
    if not all(ranges):
        return None
    sums = np.mean([np.sum([r["repeated_sums"] for r in rows], axis=0) for rows in ranges], axis=0)
    return Repeats(sums, np.sum([r["repeated_counts"] for r in ranges[0]], axis=0))


def repeats_difference(first: Repeats, second: Repeats) -> Difference:
    """Difference of two losses, first - second; the error is that of a ratio of sums over sequences."""
    both = (first.sums - second.sums, first.counts)
    value, sequences = float(both[0].sum() / both[1].sum()), int((both[1] > 0).sum())
    if sequences < 2:
        return Difference(value, math.inf)
    rest = ((both[0] - value * both[1]) ** 2).sum()
    return Difference(value, math.sqrt(rest * sequences / (sequences - 1)) / float(both[1].sum()))


def share_closed(linear: Repeats, log_linear: Repeats, softmax: Repeats) -> Difference | None:
    """``(linear - log_linear) / (linear - softmax)``; None if softmax is not clearly below linear. Error by jackknife."""
    if repeats_difference(softmax, linear).sign >= 0:
        return None

    def share(*three: Repeats) -> float:
        a, b, c = (part.loss for part in three)
        return (a - b) / (a - c)

    three = (linear, log_linear, softmax)
    used = np.flatnonzero(linear.counts)
    left_out = np.array([share(*(part.without(i) for part in three)) for i in used])
    error = math.sqrt((len(used) - 1) * left_out.var())
    return Difference(share(*three), error)
