"""The section on recall in real text: repeats by distance, definitions asked for again, and what the levels are used for."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from reporting.language import Runs
from reporting.rows import LABELS, PAIRS, SOFTMAX, seeds_of
from reporting.statistics import (
    Difference,
    check_same_sequences,
    paired,
    repeats_beyond,
    repeats_difference,
    share_closed,
)
from reporting.text import MISSING, NOT_RUN, Section, Verdict, difference, percent, picture, table

FAR = 4096  # "further than 4K away"
GOAL = 0.5  # of the gap between linear and softmax

CLAIM = (
    "The paper's claim: log-linear models recall more of a long context than their linear twins and close part of the gap "
    "to softmax attention."
)


def section(rows: list[dict]) -> Section:
    """The whole section, "not run" where rows are missing."""
    runs = seeds_of(rows)
    made = Section("Recall on real text", "recall on real text", CLAIM)
    made.add("### Repeats")
    shown = repeat_keys(runs)
    if not shown:
        made.add(NOT_RUN)
    for key in shown:
        context, packing = key.split("-")
        made.add(
            f"Loss of tokens that complete a repeat (the four tokens before them occurred earlier, and the same token "
            f"followed), by tokens since then; {int(context):,} tokens, packing {packing}, mean over seeds:",
            _repeats(runs, key),
            [f"- {line}" for line in _beyond(runs, key)],
        )
    made.verdicts += [_goal(runs, linear, log_linear, shown) for linear, log_linear in PAIRS]
    if shown:
        made.add(picture("repeats", "Loss on repeats by distance"))
    made.add("### Definitions asked for again")
    made.add(*_retrieval(runs))
    made.add("### λ by level and layer")
    made.add(*_levels(runs))
    return made


def repeat_keys(runs: Runs) -> list[str]:
    """Evaluations with repeats, the shortest context first."""
    found = {
        key: e for g in runs.values() for row in g.values() for key, e in row["evaluations"].items() if "repeats" in e
    }
    return sorted(found, key=lambda key: (found[key]["context"], key))


def repeats_of(runs: Runs, mixer: str, key: str) -> list[dict]:
    """The evaluations of a model's seeds that have repeats."""
    rows = [row["evaluations"].get(key, {}) for row in runs.get(mixer, {}).values()]
    return [evaluation for evaluation in rows if "repeats" in evaluation]


def _repeats(runs: Runs, key: str) -> list[str]:
    losses: dict[str, dict[int, float]] = {}
    last: dict[int, tuple[int, int]] = {}
    for mixer in runs:
        found = repeats_of(runs, mixer, key)
        if not found:
            continue
        check_same_sequences(found)
        ranges = [{r["first"]: r for r in evaluation["repeats"] if r.get("repeated_tokens")} for evaluation in found]
        losses[mixer] = {first: fmean(r[first]["repeated_loss"] for r in ranges) for first in ranges[0]}
        last |= {first: (r["last"], r["repeated_tokens"]) for first, r in ranges[0].items()}
    lines = [
        [f"{first:,} to {last[first][0]:,}", f"{last[first][1]:,}", *(_number(v.get(first)) for v in losses.values())]
        for first in sorted(last)
    ]
    return table(["distance", "tokens", *(LABELS[mixer] for mixer in losses)], lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _beyond(runs: Runs, key: str) -> list[str]:
    """Pooled over all distances beyond 4K: each pair's difference and the share of the gap to softmax that is closed."""
    lines = []
    for linear, log_linear in PAIRS:
        parts = [repeats_of(runs, mixer, key) for mixer in (linear, log_linear, SOFTMAX)]
        if not parts[0] or not parts[1]:
            lines.append(f"{LABELS[log_linear]} against {LABELS[linear]} beyond 4K: {MISSING}.")
            continue
        check_same_sequences([evaluation for part in parts for evaluation in part])
        a, b = (repeats_beyond(part, FAR) for part in parts[:2])
        if a is None or b is None:
            lines.append(f"{LABELS[log_linear]} against {LABELS[linear]}: no repeats beyond 4K in {key}.")
            continue
        gap = repeats_difference(b, a)
        said = {-1: "lower", 1: "higher", 0: "no clear difference"}[gap.sign]
        line = (
            f"{LABELS[log_linear]} against {LABELS[linear]} beyond 4K ({int(a.counts.sum()):,} tokens): {b.loss:.3f} against "
            f"{a.loss:.3f}, {said} ({difference(gap, 3)} nats)."
        )
        lines.append(f"{line} {_share_in_words(parts)}")
    return lines


def _share(parts: Sequence[list[dict]]) -> Difference | None:
    """Share of the gap closed, of (linear, log-linear, softmax); None where it is undefined or something is missing."""
    three = [repeats_beyond(part, FAR) if part else None for part in parts]
    if any(part is None for part in three):
        return None
    return share_closed(*three)


def _share_in_words(parts: Sequence[list[dict]]) -> str:
    if not parts[2]:
        return "Softmax attention: not run."
    share = _share(parts)
    if share is None:
        return "Softmax attention is not clearly below the linear model here: there is no gap to close."
    return f"The log-linear model closes {percent(share)} of the gap to softmax attention."


def _goal(runs: Runs, linear: str, log_linear: str, shown: list[str]) -> Verdict:
    requirement = f"Goal, {LABELS[log_linear]}: half of the gap between linear and softmax closed on repeats beyond 4K"
    numbers, result = [], MISSING
    for key in shown:
        parts = [repeats_of(runs, mixer, key) for mixer in (linear, log_linear, SOFTMAX)]
        if not all(parts) or repeats_beyond(parts[0], FAR) is None:
            continue
        share = _share(parts)
        if share is None:
            numbers.append(f"no gap at {key}")
            result = "no gap" if result == MISSING else result
        else:
            numbers.append(f"{percent(share)} at {key}")
            if result in (MISSING, "no gap"):  # the shortest context that shows a gap: where the models were trained
                result = "met" if share.value >= GOAL else "not met"
    return Verdict(requirement, result, ", ".join(numbers))


def _retrieval(runs: Runs) -> list[str | list[str]]:
    """Table by distance, a sentence for each pair, and the figure."""
    asked = retrieval_of(runs)
    if not asked:
        return [NOT_RUN]
    distances = sorted({distance for by_distance in asked.values() for distance in by_distance})
    lines = []
    for distance in distances:
        cells = [_exact(by_distance.get(distance, [])) for by_distance in asked.values()]
        count = max(r["questions"] for by_distance in asked.values() for r in by_distance.get(distance, []))
        lines.append([f"{distance:,}", str(count), *cells])
    text = (
        "`#define NAME value` asked for again, share of values that are exact, mean over seeds; in brackets, what is guessed "
        "when the definition is cut out:"
    )
    sentences = [line for pair in PAIRS for line in _retrieval_sentences(asked, *pair)]
    return [
        text,
        table(["tokens since", "questions", *(LABELS[mixer] for mixer in asked)], lines),
        [f"- {line}" for line in sentences],
        picture("retrieval", "Definitions asked for again"),
    ]


def _exact(rows: list[dict]) -> str:
    """With the definition and, in brackets, without it."""
    return (
        f"{100 * fmean(r['exact'] for r in rows):.0f}% ({100 * fmean(r['without'] for r in rows):.0f}%)" if rows else ""
    )


def retrieval_of(runs: Runs) -> dict[str, dict[int, list[dict]]]:
    """Rows of retrieval by mixer and distance, one for each seed."""
    asked: dict[str, dict[int, list[dict]]] = {}
    for mixer, group in runs.items():
        for row in group.values():
            for entry in row["retrieval"] or []:
                asked.setdefault(mixer, {}).setdefault(entry["distance"], []).append(entry)
    return asked


def _retrieval_sentences(asked: dict[str, dict[int, list[dict]]], linear: str, log_linear: str) -> list[str]:
    if linear not in asked or log_linear not in asked:
        return [f"{LABELS[log_linear]} against {LABELS[linear]}: {MISSING}."]
    found: dict[int, Difference] = {}
    for distance in sorted(set(asked[linear]) & set(asked[log_linear])):
        one, other = (
            np.mean([[int(hit) for hit in row["right"]] for row in asked[mixer][distance]], axis=0)
            for mixer in (log_linear, linear)
        )
        found[distance] = paired(one, other)
    # Questions at several distances are about the same definitions: their errors are added up as if they were one.
    mean = Difference(fmean(d.value for d in found.values()), fmean(d.error for d in found.values()))
    better = [f"{distance:,}" for distance, d in found.items() if d.sign > 0]
    worse = [f"{distance:,}" for distance, d in found.items() if d.sign < 0]
    said = {1: "above", -1: "below", 0: "no clear difference to"}[mean.sign]
    line = f"{LABELS[log_linear]}: {said} {LABELS[linear]} over all distances ({difference(mean, 1, 100)} points)"
    line += f"; clearly above at {', '.join(better) or 'none'}, clearly below at {', '.join(worse) or 'none'}."
    return [line]


def levels_of(runs: Runs) -> dict[str, list[dict]]:
    """λ by layer of each log-linear model's first seed, at the longest context measured."""
    found = {}
    for mixer, group in runs.items():
        row = group[min(group)]
        measured = {e["context"]: e["levels"] for e in row["evaluations"].values() if "levels" in e}
        if measured:
            found[mixer] = measured[max(measured)]
    return found


def _levels(runs: Runs) -> list[str | list[str]]:
    found = levels_of(runs)
    if not found:
        return [NOT_RUN]
    levels = max(len(layer["mean"]) for layers in found.values() for layer in layers)
    lines: list[list[str]] = [[str(level)] for level in range(levels)]
    sentences = []
    for mixer, layers in found.items():
        means = {}
        for level, line in enumerate(lines):
            known = [layer["mean"][level] for layer in layers if level < len(layer["mean"])]
            known = [value for value in known if value is not None]
            line.append(f"{fmean(known):.3f} ({min(known):.3f} to {max(known):.3f})" if known else "")
            if known:
                means[level] = fmean(known)
        first, last = sorted(means)[min(1, len(means) - 1)], max(means)
        sentences.append(
            f"- {LABELS[mixer]}: λ of level {last} is {means[last] / means[first]:.2f} times that of level {first} "
            f"({means[last]:.3f} against {means[first]:.3f})."
        )
    return [
        "Mean λ of the tokens that have a bucket at a level (level ℓ holds 2^(ℓ−1) tokens), mean and range over layers:",
        table(["level", *(LABELS[mixer] for mixer in found)], lines),
        sentences,
        picture("levels", "λ by level and layer"),
    ]
