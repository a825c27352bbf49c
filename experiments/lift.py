"""From runs to rows: ``python experiments/lift.py OUT`` collects those of runs/lift.sh and prints what the pairs differ by.

Rows go to results/lift.jsonl (losses) and results/lift_needles.jsonl (needles after a short fine-tune).

A pair is one linear model that went on twice with the same tokens in the same order, as it is and lifted. The difference of a
pair is lifted minus plain, in nats a token, with a standard error over the validation sequences that both were evaluated on.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

from collect import commit, further_tunes, language_row
from lift_figure import draw_lift
from reporting.rows import RESULTS, merge, read

KINDS = ("plain", "lifted")
FAR = 4096  # smallest distance of a repeat that is shown, in tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("out", type=Path, nargs="?", help="folder of the runs; none: only the figure")
    parser.add_argument("--commit", default=commit(), help="of the code that ran; none: that of this checkout")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--figure", type=Path, help="draw the committed rows: a path for .png and .svg")
    options = parser.parse_args()
    if options.out is not None:
        collect(options)
    if options.figure is not None:
        for path in draw_lift(read("lift", options.results), read("lift_needles", options.results), options.figure):
            print(path)


def collect(options: argparse.Namespace) -> None:
    """Rows of all that is finished, and what the pairs differ by."""
    rows = list(lifted_rows(options.out, options.commit))
    if rows:
        print(f"{len(rows)} rows collected, {merge('lift', rows, options.results)} in all")
    needles = [row for folder in sorted(options.out.glob("*-s*-*")) for row in needle_rows(folder, options.commit)]
    if needles:
        print(f"{len(needles)} fine-tunes collected, {merge('lift_needles', needles, options.results)} in all")
    for line in (*differences(rows), *needle_differences(needles)):
        print(line)


def lifted_rows(out: Path, commit: str) -> Iterator[dict]:
    """A row for each finished continuation: the row of ``language_row``, the kind, and the model at the start."""
    for folder in sorted(out.glob("*-s*-*")):
        kind = folder.name.rpartition("-")[2]
        row = language_row(folder, commit) if kind in KINDS else None
        if row is not None:
            yield row | {"kind": kind, "base": folder.name.removesuffix(f"-{kind}")}


def needle_rows(folder: Path, commit: str) -> list[dict]:
    """A row for each fine-tune on needles of a finished continuation, its kind, and the model that it started from."""
    kind = folder.name.rpartition("-")[2]
    row = language_row(folder, commit) if kind in KINDS else None
    found = [] if row is None else further_tunes(folder, row)
    return [each | {"kind": kind, "base": folder.name.removesuffix(f"-{kind}")} for each in found]


def needle_differences(rows: list[dict]) -> Iterator[str]:
    """A line for each kind of needle: the share found by plain and by lifted models, over all pairs of fine-tunes."""
    found = {(row["base"], row["tune_seed"], row["kind"]): row for row in rows}
    pairs = [
        (row, found[base, tune, "lifted"])
        for (base, tune, kind), row in found.items()
        if kind == "plain" and (base, tune, "lifted") in found
    ]
    for mixer in sorted({plain["mixer"] for plain, _ in pairs}):
        own = [pair for pair in pairs if pair[0]["mixer"] == mixer]
        for needle in sorted({cell["kind"] for plain, _ in own for cell in plain["cells"]}):
            shares = [[share(row, needle) for row in pair] for pair in own]
            before, after = (statistics.fmean(column) for column in zip(*shares))
            more = sum(b > a for a, b in shares)
            yield f"{mixer} {needle}: plain {before:.3f}, lifted {after:.3f}, lifted ahead in {more} of {len(own)} fine-tunes"


def share(row: dict, needle: str) -> float:
    """Share of the samples of one kind of needle that a model answers exactly."""
    hits = "".join(cell["right"] for cell in row["cells"] if cell["kind"] == needle)
    return hits.count("1") / len(hits)


def differences(rows: list[dict]) -> Iterator[str]:
    """A line for each pair and evaluation: the difference of its losses, and of repeats by distance."""
    found = {(row["base"], row["kind"]): row for row in rows}
    for base in sorted({base for base, _ in found}):
        plain, lifted = (found.get((base, kind)) for kind in KINDS)
        if plain is None or lifted is None:
            continue
        for name, before in plain["evaluations"].items():
            after = lifted["evaluations"].get(name)
            if after is None:
                continue
            for part, mean, error in paired(before["per_sequence"], after["per_sequence"]):
                yield f"{base} {name} {part}: lifted - plain {mean:+.4f} ± {error:.4f} nats a token"
            far = {row["first"]: row.get("repeated_loss") for row in after.get("repeats", ())}
            for row in before.get("repeats", ()):
                losses = row.get("repeated_loss"), far.get(row["first"])
                if row["first"] >= FAR and None not in losses:
                    yield f"{base} {name} repeats from {row['first']:,}: plain {losses[0]:.4f}, lifted {losses[1]:.4f}"


def paired(before: dict, after: dict) -> Iterator[tuple[str, float, float]]:
    """Mean difference over the validation sequences and its standard error: of all positions, and of each half of them."""
    rows = [
        [b - a for a, b in zip(one, other, strict=True)]
        for one, other in zip(before["losses"], after["losses"], strict=True)
    ]
    half = len(rows[0]) // 2
    for part, columns in {"all": slice(None), "first half": slice(half), "second half": slice(half, None)}.items():
        means = [statistics.fmean(row[columns]) for row in rows]
        yield part, statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means))


if __name__ == "__main__":
    main()
