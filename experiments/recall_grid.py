"""Why levels help recall, or do not: the arms of ``recall_plan`` from one queue, for as many seconds as there are.

    python experiments/recall_grid.py OUT --seconds 240 [--known experiments/results/recall.jsonl]

Rows go to OUT/recall.jsonl, one a line, and to the output as lines that begin with ROW. A cell with a row is not run again. At
the end of the time, cells that are half trained leave their state in OUT/unfinished, from which the next call goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from queue import Empty

import torch

from bucket_weights import see_buckets
from loglinear.models import LogLinearForCausalLM
from loglinear.tasks.mqar.config import VALUE_DIM, Cell
from loglinear.tasks.mqar.run import read_rows
from loglinear.tasks.mqar.side_by_side import side_by_side
from loglinear.tasks.mqar.train import build_model
from recall_plan import cell_of, wanted
from recall_report import lines

CLOSING = 8.0  # seconds before the end at which workers stop: to write what they have


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0, help="of this call, its start included")
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="files with rows of earlier calls")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--at-once", type=int, default=8, help="models that take turns in one process")
    parser.add_argument("--cells", type=int, help="no more than so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    rows_file = options.out / "recall.jsonl"
    rows = {cell_of(row["cell"]): row for path in (*options.known, rows_file) for row in read_rows(path)}
    known = len(rows)
    for cell, row in trained(rows, options, began + options.seconds - CLOSING):
        line = json.dumps({"cell": cell.identity(), **row})
        with rows_file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(f"ROW {line}", flush=True)
    print(f"{len(rows) - known} rows in {time.monotonic() - began:.0f} s")
    for path in sorted(options.out.glob("unfinished/*.pt")):
        print(
            f"unfinished: {path.stem}, {torch.load(path, map_location='cpu', weights_only=True)['steps']['done']} steps"
        )
    for line in lines(rows):
        print(line)


def trained(rows: dict[Cell, dict], options: argparse.Namespace, until: float) -> Iterator[tuple[Cell, dict]]:
    """(cell, row) of cells as they end, until the time is over; adds them to ``rows``."""
    spawn = get_context("spawn")
    cells, results, over = spawn.Queue(), spawn.Queue(), spawn.Event()
    settings = (options.device, options.at_once, options.out / "unfinished", cells, results, over)
    crew = [spawn.Process(target=work, args=settings) for _ in range(options.workers)]
    for worker in crew:
        worker.start()
    given: set[Cell] = set()
    limit = options.cells
    while time.monotonic() < until and any(worker.is_alive() for worker in crew):
        for cell in wanted(rows):
            if len(given - rows.keys()) > options.workers * options.at_once or len(given) == limit:
                break  # no more than can run, so that later cells keep the order of the plan
            if cell not in given:
                cells.put(cell)
                given.add(cell)
        if given <= rows.keys():
            break
        try:
            cell, row = results.get(timeout=0.5)
        except Empty:
            continue
        rows[cell] = row
        yield cell, row
    over.set()
    cells.cancel_join_thread()
    for worker in crew:
        worker.join(timeout=CLOSING)
        if worker.is_alive():
            worker.kill()
    while not results.empty():
        cell, row = results.get()
        rows[cell] = row
        yield cell, row


def work(device: str, at_once: int, unfinished: Path, cells: Queue, results: Queue, over: Event) -> None:
    """Train cells side by side until ``over`` is set."""
    torch.set_num_threads(1)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    unfinished.mkdir(exist_ok=True)

    def state_file(cell: Cell) -> Path:
        identity = json.dumps(cell.identity(), sort_keys=True)
        return unfinished / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.pt"

    for cell, row in side_by_side(taken(cells), at_once, device, over.is_set, build, state_file):
        results.put((cell, row))
        state_file(cell).unlink(missing_ok=True)


def taken(cells: Queue) -> Iterator[Cell | None]:
    while True:
        try:
            yield cells.get_nowait()
        except Empty:
            yield None


def build(cell: Cell) -> LogLinearForCausalLM:
    """The model of a cell; ", norm" or ", probe" behind its name has its weights see the bucket."""
    name, _, rule = cell.model.partition(", ")
    plain = build_model(Cell(**{**vars(cell), "model": name}))
    return see_buckets(plain, rule, VALUE_DIM) if rule else plain  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
