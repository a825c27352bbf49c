"""The section on needle in a haystack, after an equal short fine-tune of every model."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from loglinear.tasks.lm.evaluation import share_error
from reporting.rows import LABELS, PAIRS, seeds_of
from reporting.statistics import Difference, paired
from reporting.text import MISSING, NOT_RUN, Section, difference, picture, table

CLAIM = "The paper's claim: needles are found more often with log-linear attention than with its linear twin."

Cells = dict[str, dict[tuple[str, int], np.ndarray]]  # share of seeds that answered each sample, [samples]


def section(rows: list[dict], language: list[dict], tunes: Sequence[dict] = ()) -> Section:
    """The whole section, from the cells of the test, the models' rows (for their fine-tunes), and further fine-tunes."""
    made = Section("Needle in a haystack", "needle in a haystack", CLAIM)
    cells = by_context(rows)
    if not cells:
        made.add(NOT_RUN)
        return made
    tuned = _tuned(language)
    longest = max(tuned["contexts"]) if tuned else None
    if tuned:
        made.add(
            f"Each model is first fine-tuned for {tuned['steps']:,} steps of {tuned['batch_tokens'] * tuned['accumulate']:,} "
            f"tokens on needles in the training text, at lengths up to {longest:,}. The test is on validation text with "
            "keys and values that were not seen."
        )
    samples = [f"{count:,}" for count in sorted({len(hits) for found in cells.values() for hits in found.values()})]
    made.add(
        f"Share of exact answers, over all depths and seeds ({' or '.join(samples)} samples each, the same for all models):"
    )
    kinds_and_contexts = sorted({cell for found in cells.values() for cell in found}, key=_order(rows))
    lines = [
        [kind, f"{context:,}", *(_share(found.get((kind, context))) for found in cells.values())]
        for kind, context in kinds_and_contexts
    ]
    made.add(table(["needle", "tokens", *(LABELS[mixer] for mixer in cells)], lines))
    made.add([f"- {line}" for pair in PAIRS for line in _sentences(cells, *pair, longest)])
    made.add(*(picture(f"niah_{mixer}", f"Needles by depth and length, {LABELS[mixer]}") for mixer in cells))
    if tunes:
        made.add(*_again(tunes, rows, language))
    return made


def _again(tunes: Sequence[dict], rows: list[dict], language: list[dict]) -> list[str | list[str]]:
    """A table of all fine-tunes of the models that had several, at the lengths that all of them were tested at."""
    first = {row["name"]: row for row in language if row["tuned"]}
    names = sorted({row["name"] for row in tunes})
    found = [(row["name"], row["tuned"], row["cells"]) for row in tunes]
    found += [(name, first[name]["tuned"], [r for r in rows if r["name"] == name]) for name in names if name in first]
    found.sort(key=lambda tune: (tune[1]["steps"], tune[1]["seed"], tune[0]))
    contexts = set.intersection(*({cell["context"] for cell in tested} for *_, tested in found))
    kinds = [kind for kind, _ in sorted({(cell["kind"], 0) for cell in rows}, key=_order(rows))]
    lines = []
    for name, tune, tested in found:
        line = [name, f"{tune['steps']:,}", str(tune["seed"]), f"{tune['history'][-1][1]:.3f}"]
        for kind in kinds:
            right = "".join(c["right"] for c in tested if c["kind"] == kind and c["context"] in contexts)
            line.append(_share(np.array([int(hit) for hit in right])) if right else "")
        lines.append(line)
    shown = " and ".join(f"{context:,}" for context in sorted(contexts))
    return [
        "### Other fine-tunes",
        f"Loss of the answers in the last step, and share of exact answers at {shown} tokens together:",
        table(["model and seed", "steps", "seed of the fine-tune", "loss", *kinds], lines),
    ]


def by_context(rows: list[dict]) -> Cells:
    """Right answers by mixer, kind and length: samples of all depths, a mean over seeds."""
    found: Cells = {}
    for mixer, by_name in heatmap_rows(rows).items():
        hits: dict[tuple[str, int], list[list[int]]] = {}
        for own in by_name.values():
            answers: dict[tuple[str, int], list[int]] = {}
            for row in sorted(own, key=lambda row: row["depth"]):
                answers.setdefault((row["kind"], row["context"]), []).extend(int(hit) for hit in row["right"])
            for cell, right in answers.items():
                hits.setdefault(cell, []).append(right)
        found[mixer] = {cell: np.mean(right, axis=0) for cell, right in hits.items()}
    return found


def heatmap_rows(rows: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Cells by mixer, then by name of the run."""
    return {
        mixer: {row["name"]: [r for r in rows if r["name"] == row["name"]] for row in group.values()}
        for mixer, group in _first(rows).items()
    }


def tuned_context(language: list[dict]) -> int | None:
    """Longest length of the fine-tune, None if there was none."""
    tuned = _tuned(language)
    return max(tuned["contexts"]) if tuned else None


def _first(rows: list[dict]) -> dict[str, dict[int, dict]]:
    return seeds_of(list({row["name"]: row for row in rows}.values()))


def _tuned(language: list[dict]) -> dict | None:
    settings = [row["tuned"] for group in seeds_of(language).values() for row in group.values() if row["tuned"]]
    without_history = [{k: v for k, v in tuned.items() if k != "history"} for tuned in settings]
    if any(tuned != without_history[0] for tuned in without_history):
        raise ValueError(f"rows: the models were fine-tuned in different ways: {without_history}")
    return without_history[0] if without_history else None


def _order(rows: list[dict]):
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    preferred = [kind for kind in ("number", "word", "multi-key", "multi-value") if kind in kinds]
    order = [*preferred, *(kind for kind in sorted(kinds) if kind not in preferred)]
    return lambda cell: (order.index(cell[0]), cell[1])


def _share(answers: np.ndarray | None) -> str:
    if answers is None:
        return ""
    return f"{100 * answers.mean():.0f}% ± {100 * share_error(float(answers.mean()), len(answers)):.0f}"


def _sentences(cells: Cells, linear: str, log_linear: str, longest: int | None) -> list[str]:
    """How many cells are clearly above, clearly below or neither, within the lengths of the fine-tune and beyond."""
    names = f"{LABELS[log_linear]} against {LABELS[linear]}"
    if linear not in cells or log_linear not in cells:
        return [f"{names}: {MISSING}."]
    lines = []
    both = [cell for cell in cells[linear] if cell in cells[log_linear]]
    parts = [("at lengths of the fine-tune", [c for c in both if longest is None or c[1] <= longest])]
    if longest is not None:
        parts.append(("beyond them", [c for c in both if c[1] > longest]))
    for where, chosen in parts:
        if chosen:
            found = [paired(cells[log_linear][cell], cells[linear][cell]) for cell in chosen]
            above, below = (sum(d.sign == sign for d in found) for sign in (1, -1))
            error = sum(d.error**2 for d in found) ** 0.5 / len(found)
            mean = Difference(fmean(d.value for d in found), error)
            lines.append(
                f"{names}, {where}: clearly above in {above} of {len(found)} cells of the table, clearly below in {below}; "
                f"{difference(mean, 1, 100)} points on average."
            )
    return lines
