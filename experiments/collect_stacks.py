"""From the rows of stacks to committed rows: ``python experiments/collect_stacks.py FILE...``, then ``report.py``.

Takes the files that ``recall_grid.py``, ``text_stacks.py``, ``documents.py`` and ``genome.py`` write. A row of a copy's needles
joins the row of its training. The mean losses of a genome's sequences are kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from loglinear.tasks.mqar.run import read_rows
from measure import commit
from reporting.rows import RESULTS, identity, merge, read
from reporting.statistics import sequence_losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--commit", default=commit(), help="of the code that ran; none: that of this checkout")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args()
    new = [row | {"commit": options.commit} for file in options.files for row in read_rows(file)]
    for name, rows in collect(new, options.results).items():
        if rows:
            print(f"{name}: {len(rows)} rows collected, {merge(name, rows, options.results)} in all")


def collect(new: Iterable[dict], results: Path) -> dict[str, list[dict]]:
    """Rows by the name of their file, each joined with the committed row of its identity."""
    fields = {"cell": "recall", "copy": "text_stacks", "checkpoint": "documents", "run": "genome"}
    found: dict[str, dict[str, dict]] = {name: {} for name in fields.values()}
    for row in new:
        name = next(name for field, name in fields.items() if field in row)
        for one in row["evaluations"] if name == "genome" else []:
            one["by_sequence"] = sequence_losses(one).tolist()
            del one["per_sequence"]
        key = identity(name)(row)
        found[name][key] = found[name].get(key, {}) | row
    for name, rows in found.items():
        for old in read(name, results):
            key = identity(name)(old)
            if key in rows:
                rows[key] = old | rows[key]
    return {name: list(rows.values()) for name, rows in found.items()}


if __name__ == "__main__":
    main()
