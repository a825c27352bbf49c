"""From run folders to committed rows: ``python experiments/collect.py OUT``, then ``python experiments/report.py``.

Reads what is finished of the runs OUT/<name>-s<seed> and of OUT/mqar, says what is missing, and writes
results/{lm,niah,tunes,mqar}.jsonl. Collecting again replaces rows of the same identity: a model's name, and a cell of the
needle test or of associative recall, or the settings of a further fine-tune.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from measure import commit
from reporting.rows import LABELS, PAIRS, RESULTS, merge

CURVE_POINTS = 100  # of a training curve
EXPECTED = [f"{mixer}-s{seed}" for mixer in LABELS for seed in ((0, 1) if mixer in sum(PAIRS, ()) else (0,))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--mqar", type=Path, help="folder of associative recall; none: OUT/mqar")
    parser.add_argument("--commit", default=commit(), help="of the code that ran; none: that of this checkout")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args()
    for line in collect(options.out, options.results, options.commit, options.mqar or options.out / "mqar"):
        print(line)


def collect(out: Path, results: Path, commit: str, mqar: Path) -> Iterator[str]:
    """Write the rows of everything that is finished; yields what was found and what is missing."""
    if not out.is_dir():
        raise SystemExit(f"collect: no folder {out}")
    folders = [folder for folder in sorted(out.iterdir()) if folder.is_dir() and re.search(r"-s\d+$", folder.name)]
    language, needles, tunes = [], [], []
    for folder in folders:
        row = language_row(folder, commit)
        if row is not None:
            language.append(row)
            needles += needle_rows(folder, row)
            tunes += further_tunes(folder, row)
        yield f"{folder.name}: {describe(folder, row)}"
    yield from (f"missing: {name}" for name in EXPECTED if name not in {row["name"] for row in language})
    recall = {json.dumps(row["cell"], sort_keys=True): row | {"commit": commit} for row in recall_rows(mqar)}
    if not recall:
        yield f"missing: {mqar / 'rows.jsonl'}"
    for name, rows in (("lm", language), ("niah", needles), ("tunes", tunes), ("mqar", list(recall.values()))):
        if rows:
            yield f"{results / name}.jsonl: {len(rows)} rows collected, {merge(name, rows, results)} in all"


def language_row(folder: Path, commit: str) -> dict | None:
    """All that is kept of one language model, without its needles; None if its training is not finished."""
    record = load(folder / "record.json")
    if record is None or record.get("status") != "complete":
        return None
    arguments = record["arguments"]
    logs = [log for log in record["history"] if "loss" in log]
    # The first log's time is that of compiling.
    speeds = sorted(log["tokens_per_second"] for log in (logs[1:] or logs))
    per_step = arguments["batch_size"] * arguments["accumulate"] * arguments["context"] * arguments.get("processes", 1)
    return {
        "name": folder.name,
        "mixer": arguments["mixer"][0] if len(set(arguments["mixer"])) == 1 else "mixed",
        "seed": arguments["seed"],
        "commit": commit,
        "gpu": record["versions"]["device"],
        "versions": {name: v for name, v in record["versions"].items() if name != "device"},
        "data": record["data"],
        "arguments": arguments,
        "parameters": record["model"]["parameters"],
        "tokens": arguments["steps"] * per_step,
        **record["metrics"],
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_20_80": [speeds[round(q * (len(speeds) - 1))] for q in (0.2, 0.8)],
        "memory_gib": max(log["memory_gib"] for log in logs),
        "curve": thin([[log["step"], log["loss"]] for log in logs]),
        "validation_curve": thin([[log["step"], log["eval_loss"]] for log in record["history"] if "eval_loss" in log]),
        "evaluations": evaluations(folder),
        "retrieval": next((load(path)["rows"] for path in sorted(folder.glob("*/retrieval.json"))), None),
        "tuned": tuned(folder / "tuned"),
    }


def evaluations(folder: Path) -> dict[str, dict]:
    """Every ``loss_by_position.json`` below a run, with the repeats and λ beside it, by context and packing."""
    found: dict[str, dict] = {}
    for path in sorted(folder.glob("*/loss_by_position.json")):
        result = load(path)
        kept = ("context", "packing", "data", "hash", "side", "sequences", "predictions", "loss", "standard_error")
        row = {name: result[name] for name in (*kept, "perplexity", "per_sequence")}
        columns = ("first", "last", "loss", "standard_error")
        row["by_position"] = [[bucket[name] for name in columns] for bucket in result["by_position"]]
        repeats, levels = load(path.with_name("repeats.json")), load(path.with_name("levels.json"))
        if repeats is not None:
            row["repeats"] = repeats["rows"]
        if levels is not None:
            row["levels"] = [level_row(layer) for layer in levels["rows"]]
        found.setdefault(f"{result['context']}-{result['packing']}", {}).update(row)
    return found


def level_row(layer: dict) -> dict:
    """Mean λ of each level over the heads of a layer, and its standard deviation; None where no token has a bucket."""
    heads = [[head[level] for head in layer["heads"]] for level in range(len(layer["heads"][0]))]
    mean = [None if None in values else statistics.fmean(values) for values in heads]
    spread = [None if None in values else statistics.pstdev(values) for values in heads]
    return {"layer": layer["layer"].removeprefix("model."), "mean": mean, "spread": spread}


def tuned(folder: Path) -> dict | None:
    """Settings and course of the fine-tune on needles that ``folder`` holds, None if there was none."""
    record = load(folder / "record.json")
    if record is None:
        return None
    niah = record["niah"]
    kept = ("contexts", "steps", "batch_tokens", "accumulate", "learning_rate", "seed")
    history = [[log["step"], log["loss"], log["exact"]] for log in niah["history"]]
    return {**{name: niah[name] for name in kept}, "history": thin(history, 30)}


def needle_rows(folder: Path, row: dict) -> list[dict]:
    """The cells of the needle test of one model."""
    result = load(folder / "niah" / "niah.json")
    who = {name: row[name] for name in ("name", "mixer", "seed")}
    return [] if result is None else [{**who, **cell} for cell in result["cells"]]


def further_tunes(folder: Path, row: dict) -> list[dict]:
    """A row for every further fine-tune of one model, ``tuned-<name>`` with its test ``niah-<name>``: the hits of each cell."""
    rows = []
    for path in sorted(folder.glob("niah-*/niah.json")):
        settings = tuned(folder / path.parent.name.replace("niah", "tuned", 1))
        if settings is not None:
            who = {name: row[name] for name in ("name", "mixer", "seed", "commit")}
            cells = [
                {name: cell[name] for name in ("kind", "context", "depth", "right")} for cell in load(path)["cells"]
            ]
            rows.append(
                {**who, "steps": settings["steps"], "tune_seed": settings["seed"], "tuned": settings, "cells": cells}
            )
    return rows


def recall_rows(folder: Path) -> Iterator[dict]:
    """Rows of associative recall, of the grid and of its further parts; some stand in several files."""
    for path in [folder / "rows.jsonl", *sorted(folder.glob("*/rows.jsonl"))]:
        if path.exists():
            lines = path.read_text(encoding="utf-8").split("\n")
            yield from (json.loads(line) for line in lines[:-1] if line)  # behind the last newline: a line cut off


def describe(folder: Path, row: dict | None) -> str:
    """The state of a run in words: which files it has, and which are missing."""
    if row is None:
        record = load(folder / "record.json")
        return "no record.json" if record is None else f"not finished, its record says {record['status']!r}"
    have = {f"loss by position at {name}": True for name in row["evaluations"]}
    have |= {f"repeats at {name}": "repeats" in row["evaluations"][name] for name in row["evaluations"]}
    if row["mixer"].startswith("log_linear"):
        have["levels"] = any("levels" in evaluation for evaluation in row["evaluations"].values())
    have |= {"retrieval": row["retrieval"] is not None, "fine-tune": row["tuned"] is not None}
    have["needles"] = (folder / "niah" / "niah.json").exists()
    lacking = [name for name, there in have.items() if not there] + ([] if row["evaluations"] else ["loss by position"])
    return ", ".join(name for name, there in have.items() if there) + (
        f"; MISSING {', '.join(lacking)}" * bool(lacking)
    )


def load(path: Path) -> dict | None:
    """A JSON file, without the folders of its paths: they say where a machine keeps things, not what was run."""
    return without_folders(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def without_folders(value: Any) -> Any:
    """The value with every absolute path replaced by its last part."""
    if isinstance(value, dict):
        return {name: without_folders(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def thin(points: list, count: int = CURVE_POINTS) -> list:
    """At most ``count`` of the points, evenly spread, the last among them."""
    if len(points) <= count:
        return points
    return [points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)]


if __name__ == "__main__":
    main()
