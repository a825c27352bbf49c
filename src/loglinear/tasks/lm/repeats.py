"""Recall in running text: the loss where the last tokens have been seen before, by how far back that was.

A token counts if the ``NGRAM`` tokens before it occurred earlier in its sequence. Its distance is the distance to the token
that followed them the last time. If the two tokens are equal, the text repeats itself, and a model that remembers can know
the token. Such tokens are counted apart as "repeated".
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from loglinear.tasks.style import canvas, colors_of, label_ends, save, styled, token_axis

NGRAM = 4


def repeat_distances(ids: np.ndarray, ngram: int = NGRAM) -> tuple[np.ndarray, np.ndarray]:
    """For each prediction of one sequence ``ids [T]``: distance to the last repeat, int64 ``[T - 1]``, and whether it held.

    Entry ``p`` is about token ``p + 1``, as in ``position_losses``. The distance is 0 where the ``ngram`` tokens before
    the token did not occur earlier; ``held`` says that the token is the one that followed them then.
    """
    length = len(ids)
    distances, held = np.zeros(max(length - 1, 0), np.int64), np.zeros(max(length - 1, 0), bool)
    codes = _ngram_codes(np.asarray(ids, np.int64), ngram)[: max(length - ngram, 0)]
    order = np.argsort(codes, kind="stable")
    same = codes[order[1:]] == codes[order[:-1]]
    later, earlier = order[1:][same] + ngram, order[:-1][same] + ngram  # the tokens behind two equal runs
    distances[later - 1] = later - earlier
    held[later - 1] = ids[later] == ids[earlier]
    return distances, held


def _ngram_codes(ids: np.ndarray, ngram: int) -> np.ndarray:
    """A number for each run of ``ngram`` tokens. Two numbers are equal if and only if their runs are."""
    first = codes = np.unique(ids, return_inverse=True)[1]
    for n in range(1, min(ngram, len(ids))):
        # Both factors are below T after the renumbering, so the product fits.
        pairs = codes[:-1] * np.int64(len(ids)) + first[n:]
        codes = np.unique(pairs, return_inverse=True)[1]
    return codes


def by_distance(ids: np.ndarray, losses: np.ndarray, ngram: int = NGRAM) -> list[dict]:
    """Loss in ranges of distance that double: of ``ids [sequences, T]`` and ``losses [sequences, T - 1]``.

    Each row has the ``first`` and ``last`` distance in tokens (0, 0: no repeat). It has the number, the loss and the
    standard error (in nats) of all tokens and of the repeated tokens. Sequences are the independent samples. Empty ranges
    are left out. ``repeated_sums`` and ``repeated_counts`` have a number for each sequence, so that models can be compared
    on each.
    """
    found = [repeat_distances(row, ngram) for row in ids]
    distances, held = np.stack([row[0] for row in found]), np.stack([row[1] for row in found])
    ranges = np.frexp(distances)[1]  # bits of the distance: 0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7
    rows = []
    for number in np.unique(ranges):
        chosen = ranges == number
        first = 0 if number == 0 else 1 << int(number) - 1
        row = {"first": first, "last": max(2 * first - 1, 0), **_mean("tokens", "loss", losses, chosen)}
        if number:
            chosen &= held
            row |= _mean("repeated_tokens", "repeated_loss", losses, chosen)
            row["repeated_sums"] = np.where(chosen, losses, 0).sum(1, dtype=np.float64).round(4).tolist()
            row["repeated_counts"] = chosen.sum(1).tolist()
        rows.append(row)
    return rows


def _mean(count_name: str, name: str, losses: np.ndarray, chosen: np.ndarray) -> dict:
    """Mean over the chosen tokens, and its standard error as a ratio of two sums over sequences."""
    counts, sums = chosen.sum(1), np.where(chosen, losses, 0).sum(1, dtype=np.float64)
    total, sequences = int(counts.sum()), int((counts > 0).sum())
    if not total:
        return {count_name: 0, name: None, f"{name}_standard_error": None}
    mean = sums.sum() / total
    error = None  # one sequence has no spread
    if sequences > 1:
        error = math.sqrt(((sums - mean * counts) ** 2).sum() * sequences / (sequences - 1)) / total
    return {count_name: total, name: float(mean), f"{name}_standard_error": error}


@styled
def draw_repeats(results: dict[str, list[dict]], path: Path) -> list[Path]:
    """Save PNG and SVG of the loss by distance of each model, from ``by_distance``. Bands are one standard error."""
    figure, panels = canvas(_title(results), size=(5.0, 3.0), right=2.6)
    panel, colors, ends = panels[0, 0], colors_of(results), []
    for name, rows in results.items():
        for field, style, label in (("loss", "--", "all tokens"), ("repeated_loss", "-", "the same token follows")):
            shown = [row for row in rows if row["first"] and row[field] is not None]
            distance = np.array([row["first"] for row in shown])
            mean = np.array([row[field] for row in shown])
            error = np.array([row[f"{field}_standard_error"] for row in shown], dtype=float)  # None becomes nan
            panel.plot(distance, mean, style, color=colors[name], marker=".")
            panel.fill_between(distance, mean - error, mean + error, alpha=0.2, color=colors[name], linewidth=0)
            if len(mean):
                ends.append((mean[-1], f"{name}: {label}", colors[name]))
    distances = [row["first"] for rows in results.values() for row in rows if row["first"]]
    if distances:  # without distances there is no logarithmic axis
        token_axis(panel, distances)
    panel.set_xlabel(f"tokens since the last {NGRAM} tokens occurred before")
    panel.set_ylabel("loss (nats per token)")
    label_ends(panel, ends)
    return save(figure, path)


def _title(results: dict[str, list[dict]]) -> str:
    name, rows = next(iter(results.items()))
    known = [row for row in rows if row["first"] and row["repeated_loss"] is not None]
    if not known:
        return "No token of this text completes a repeat"
    near, far = known[0], known[-1]
    where = f"at a distance of {near['first']:,} costs {near['repeated_loss']:.2f} nats, one at {far['first']:,}"
    return f"{name}: a repeat {where} {far['repeated_loss']:.2f}"
