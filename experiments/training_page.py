"""The tables of docs/training.md from committed rows alone: ``python experiments/training_page.py``.

The command writes the text between the marks, and a test compares this text with the text that the committed rows give. The
rest of the page is written by hand. A ratio compares rows of one commit, the newest commit that has both.

    python experiments/training_page.py --figure docs/figures/training.png    # draws the rows, and makes no page
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from reporting.rows import read as rows_of
from reporting.text import table
from reporting.training import FASTER, FLASH, NAME, SHOWN, draw, figures
from training_parts import PARTS

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
BEGIN, END = "<!-- rows -->", "<!-- /rows -->"


def newest(rows: list[dict]) -> list[dict]:
    """The last row of each kind of step, by context and model."""
    kinds = ("longest", "model", "T", "tokens", "residual", "offload", "compiled", "checkpointing")
    found = {tuple(row[kind] for kind in kinds): row for row in rows}
    models = list(SHOWN)
    return sorted(found.values(), key=lambda row: (row["longest"], row["tokens"], row["T"], models.index(row["model"])))


def required(rows: list[dict]) -> list[str]:
    """Every figure with a requirement, from the newest commit that gives it."""
    commits = dict.fromkeys(row["commit"] for row in rows)
    found = {}
    for commit in commits:
        for kind in dict.fromkeys((row["tokens"], row["residual"]) for row in rows):
            some = [row for row in rows if (row["commit"], row["tokens"], row["residual"]) == (commit, *kind)]
            found |= {what + stream(some[0]): (figure, commit) for what, figure in figures(some).items()}
    compared = side_by_side(rows)
    if FASTER in found and FASTER in (all_lengths := figures(compared)):
        found[FASTER] = all_lengths[FASTER], ", ".join(dict.fromkeys(row["commit"] for row in compared))
    lines = []
    for what, given in found.items():
        model, outside, rest = what.partition(" outside")
        lines.append([SHOWN[model] + outside + rest if outside else what, *given])
    return table(["figure", "measured", "commit"], lines, words=3)


def stream(row: dict) -> str:
    """The words to add to the name of a row with another residual stream than float32."""
    return "" if row["residual"] == "float32" else f", {row['residual']} stream"


def side_by_side(rows: list[dict]) -> list[dict]:
    """For each length the rows of Log-Linear Mamba-2 and of FlashAttention-2's Transformer at the newest commit with both."""
    plain = [r for r in rows if not r["longest"] and not r["checkpointing"] and r["compiled"] != "no" and not stream(r)]
    kinds = {(row["T"], row["commit"], row["model"]): row for row in plain}
    pairs = {
        length: (row, kinds[length, commit, FLASH])
        for (length, commit, model), row in kinds.items()
        if model == "log_linear_mamba2" and (length, commit, FLASH) in kinds
    }
    return [row for length in sorted(pairs) for row in pairs[length]]


def steps(rows: list[dict]) -> list[str]:
    """A line for each kind of step."""
    lines = []
    for row in newest(rows):
        about = {
            f"{row['residual']} stream": row["residual"] != "float32",
            "checkpointed": row["checkpointing"],
            "offloaded": row["offload"],
            "eager": row["compiled"] == "no",
            "growing segments": "expandable" in row.get("allocator", ""),
        }
        notes = [note for note, holds in about.items() if holds]
        times = [row["ms"]] if row["longest"] else [row["ms"], row["ms_low"], row["ms_high"]]
        spread = "{:,.1f}" if row["longest"] else "{:,.1f} ({:,.1f} to {:,.1f})"
        words = [SHOWN[row["model"]], ", ".join(notes), row["commit"]]
        counts = [f"{row['T']:,}", f"{row['B'] * row['T']:,}", spread.format(*times), f"{row['tokens_per_s']:,.0f}"]
        lines.append([*words, *counts, f"{row['peak_bytes'] / 2**30:.1f}", f"{row['flop_share']:.1%}"])
    heads = ["model", "notes", "commit", "context", "tokens", "ms a step", "tokens/s", "peak GiB", "of peak FLOP/s"]
    return table(heads, lines, words=3)


def parts(rows: list[dict], length: int) -> list[str]:
    """Milliseconds by part at one context."""
    lines = []
    for row in newest(rows):
        if row["T"] == length and "parts_ms" in row and not row["checkpointing"] and row["compiled"] != "no":
            each = [f"{row['parts_ms'][part]:.1f}" for part in PARTS]
            lines.append(
                [
                    SHOWN[row["model"]] + stream(row),
                    row["commit"],
                    *each,
                    f"{row['ms']:.1f}",
                    f"{row['outside_share']:.1%}",
                ]
            )
    return table(["model", "commit", *PARTS, "step", "outside of products and op"], lines, words=2)


def tables(rows: list[dict]) -> str:
    """The text between the marks."""
    device = ", ".join(dict.fromkeys(row["gpu"] for row in rows))
    versions = ", ".join(dict.fromkeys(f"torch {row['torch']}, Triton {row['triton']}" for row in rows))
    lines = [f"{device}; {versions}.", "", *required(rows), "", "Milliseconds by part at 16,384 tokens:", ""]
    lines += [*parts(rows, 1 << 14), "", "All steps, the newest row of each kind:", "", *steps(rows)]
    return "\n".join(lines)


def filled(text: str, rows: list[dict]) -> str:
    """The page with its tables. Raises ValueError if it lacks a mark."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must have {BEGIN} and, behind it, {END}: got one of them, none or the other order")
    return f"{before}{BEGIN}\n\n{tables(rows)}\n\n{END}{after}"


def read(results: Path | None = None) -> list[dict]:
    """The rows of one width and vocabulary, the paper's, on GPUs."""
    return [
        row
        for row in rows_of(NAME, results)
        if "gpu" in row and (row["hidden_size"], row["vocab_size"]) == (1536, 32000)
    ]


def drawn(options: argparse.Namespace) -> list[dict]:
    """The rows of the figure: steps of these sizes. Exits where there are none."""
    same = ("hidden_size", "vocab_size", "tokens", "residual")
    rows = [row for row in rows_of(NAME, options.results) if not row["longest"]]
    rows = [row for row in rows if all(row[key] == getattr(options, key) for key in same)]
    rows = [row for row in rows if options.models is None or row["model"] in options.models]
    if not rows:
        raise SystemExit("no rows of these sizes: python benchmarks/training.py writes them")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--results", type=Path, help="folder of the rows; none: the committed ones")
    parser.add_argument("--page", type=Path, default=PAGE, help="page whose tables are made again")
    parser.add_argument("--figure", type=Path, help="PNG to draw in place of the page; an SVG stands beside it")
    of = parser.add_argument_group("rows of the figure")
    of.add_argument("--models", nargs="+", help="default: all")
    of.add_argument("--commits", nargs="+", default=(), help="default: those of the newest day")
    of.add_argument("--hidden-size", type=int, default=1536)
    of.add_argument("--vocab-size", type=int, default=32_000)
    of.add_argument("--tokens", type=int, default=1 << 15, help="of a step")
    of.add_argument("--residual", default="float32", help="dtype of the stream")
    options = parser.parse_args()
    if options.figure is not None:
        made = draw(drawn(options), options.commits, options.figure)
    else:
        text = filled(options.page.read_text(encoding="utf-8"), read(options.results))
        options.page.write_text(text, encoding="utf-8")
        made = [options.page]
    for path in made:
        print(path)


if __name__ == "__main__":
    main()
