"""docs/results.md and its figures from committed rows alone: ``python experiments/report.py``.

Every number and every sentence about a number comes from the rows. A test compares the committed page with the page that the
committed rows give. The meaning of the numbers is written by hand in docs/results_notes.md, and each note goes to the end of
its section.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from reporting import associative, language, levels, needles, recall, smaller
from reporting.rows import RESULTS, read
from reporting.text import MISSING, Section, table

DOCS = Path(__file__).parents[1] / "docs"

TITLE = "# Results"
OPENING = "when to use it"  # heading in the notes
REQUIRED = "These thresholds were set before the runs above. They are ours, not the paper's."
HEAD = """## Larger models

This part compares softmax attention, two linear models, and their log-linear twins at equal width, data and steps. The tasks
are multi-query associative recall, language modelling on C files, recall in that text, and needle in a haystack. The command
`python experiments/report.py` makes the page from the rows in `experiments/results`. Only the paragraphs under "Reading" are
written by hand (`docs/results_notes.md`).

A difference counts here if it is further from 0 than two standard errors, in every seed. Losses are compared sequence by
sequence on the same text. These standard errors concern the text alone. Two trainings of one model differ too, so seeds are
listed singly. `experiments/runs/` has the commands.
"""


def sections(results: Path = RESULTS) -> list[Section]:
    """All sections, in the order of the page."""
    rows = {name: read(name, results) for name in ("lm", "niah", "tunes", "mqar")}
    return [
        associative.section(rows["mqar"]),
        language.section(rows["lm"]),
        recall.section(rows["lm"]),
        needles.section(rows["niah"], rows["lm"], rows["tunes"]),
    ]


def opening(results: Path = RESULTS, said: str = "") -> list[str]:
    """The lines that the page opens with: what levels add, and when to use them, with what is ``said`` by hand."""
    text = read("text_stacks", results)
    more = [
        *smaller.lifted_lines(read("lift", results), read("lift_needles", results)),
        *smaller.recipe_lines(text),
        *smaller.start_lines(text),
        *smaller.document_lines(read("documents", results)),
        *smaller.genome_lines(read("genome", results)),
    ]
    return levels.opening(read("recall", results), text, more, said)


def page(made: list[Section], notes: dict[str, str], first: Sequence[str] = ()) -> str:
    """The text of docs/results.md, which opens with ``first``. Raises ValueError for notes that belong to no section."""
    unknown = set(notes) - {section.notes for section in made}
    if unknown:
        raise ValueError(f"results_notes.md: no section {sorted(unknown)}, only {[section.notes for section in made]}")
    verdicts = [verdict for section in made for verdict in section.verdicts]
    lines = [TITLE, "", *first, *HEAD.splitlines(), ""]
    for section in made:
        lines += [f"## {section.title}", "", section.claim, "", *section.lines]
        if notes.get(section.notes):
            lines += ["### Reading", "", *notes[section.notes].splitlines(), ""]
    shown = [[v.requirement, v.result, v.numbers] for v in verdicts]
    run = [verdict for verdict in verdicts if verdict.result != MISSING]
    met = sum(verdict.result == "met" for verdict in run)
    lines += ["## What was required", "", REQUIRED, ""]
    lines += [f"{met} of {len(verdicts)} met, {len(verdicts) - len(run)} not run.", ""]
    lines += [*table(["requirement", "result", "numbers"], shown, words=3), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def read_notes(path: Path) -> dict[str, str]:
    """Hand-written paragraphs by the title of their ``## heading``, in small letters; what stands before is left out."""
    if not path.exists():
        return {}
    _, *parts = re.split(r"^## (.+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {title.strip().lower(): text.strip() for title, text in zip(parts[::2], parts[1::2])}


def main() -> None:
    from reporting.figures import draw_all

    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of results.md, results_notes.md and figures/")
    options = parser.parse_args()
    notes = read_notes(options.docs / "results_notes.md")
    first = opening(options.results, notes.pop(OPENING, ""))
    text = page(sections(options.results), notes, first)
    options.docs.mkdir(parents=True, exist_ok=True)
    (options.docs / "results.md").write_text(text, encoding="utf-8")
    print(options.docs / "results.md")
    for path in draw_all(options.results, options.docs / "figures"):
        print(path)


if __name__ == "__main__":
    main()
