"""A grid of cells, run by worker processes that train several models each. An interrupted grid continues where it stopped.

The rows file is the only memory. A worker appends a row when a cell is done, and a cell with a row is skipped. Any part of a
grid can therefore run at any time, in any order, with any number of workers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from queue import Empty

from loglinear.tasks.lm.atomic import naming
from loglinear.tasks.mqar.config import Cell, Grid
from loglinear.tasks.mqar.report import best_rate
from loglinear.tasks.mqar.side_by_side import Share, start_worker, work

LOOK = 0.5  # seconds to wait for a row before a look at the workers' errors


def read_rows(path: Path) -> list[dict]:
    """The rows in ``path``, none if there is no such file; a last line that a killed process cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def run_grid(
    grid: Grid, path: Path, workers: int, device: str, on_row: Callable[[dict, int, int], None], at_once: int = 1
) -> list[dict]:
    """Train what ``path`` does not have yet; returns the rows of the grid's seeds and rates.

    ``workers`` processes train ``at_once`` models each. The learning rate is swept with the first seed; as soon as a sweep is
    complete, the other seeds follow at its best rate. ``on_row(row, done, total)`` is called for every new row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_cut_line(path)
    sweeps = list(grid.sweeps())
    total = sum(len(sweep) for sweep in sweeps) + len(sweeps) * (len(grid.seeds) - 1)
    rows = {_key(row["cell"]): row for row in read_rows(path)}

    def wanted() -> dict[str, Cell]:
        return {_key(cell.identity()): cell for cell in _wanted(sweeps, grid.seeds, rows)}

    missing = len(wanted().keys() - rows.keys())
    with closing(_train(wanted, rows, min(workers, missing), at_once, device)) as trained:
        for cell, result in trained:
            row = {"cell": cell.identity(), **result}
            _append(path, row)
            rows[_key(row["cell"])] = row
            on_row(row, len(wanted().keys() & rows.keys()), total)
    return [rows[key] for key in wanted()]


def _wanted(sweeps: list[list[Cell]], seeds: tuple[int, ...], rows: dict[str, dict]) -> list[Cell]:
    """The cells of all sweeps, then those of the other seeds for each sweep that ``rows`` has completely."""
    others = []
    for sweep in sweeps:
        swept = [rows.get(_key(cell.identity())) for cell in sweep]
        done = [row for row in swept if row is not None]
        if len(done) == len(sweep):
            others += [replace(sweep[0], learning_rate=best_rate(done), seed=seed) for seed in seeds[1:]]
    return [*(cell for sweep in sweeps for cell in sweep), *others]


def _train(
    wanted: Callable[[], dict[str, Cell]], rows: dict[str, dict], workers: int, at_once: int, device: str
) -> Generator[tuple[Cell, dict]]:
    """(cell, row) of each wanted cell that ``rows``, which the caller fills, does not have; an error in a worker is raised."""
    if not workers:
        return
    spawn = get_context("spawn")
    share = Share(device, workers, at_once, spawn.Value("i", 0), spawn.Queue(), spawn.Queue(), spawn.Event())
    given: set[str] = set()
    with ProcessPoolExecutor(workers, spawn, start_worker, (share,)) as pool:
        try:
            crew = [pool.submit(work) for _ in range(workers)]
            while True:
                new = [cell for key, cell in wanted().items() if key not in rows and key not in given]
                for cell in sorted(new, key=_cost, reverse=True):  # no worker is left alone with a long one at the end
                    share.cells.put(cell)
                    given.add(_key(cell.identity()))
                if given <= rows.keys():
                    break
                yield _next_row(share, crew)
        finally:
            share.over.set()
            share.cells.cancel_join_thread()


def _next_row(share: Share, crew: list[Future]) -> tuple[Cell, dict]:
    while True:
        try:
            return share.rows.get(timeout=LOOK)
        except Empty:
            for worker in crew:
                if worker.done():  # before the end, a worker stops only by an error
                    worker.result()
                    raise RuntimeError("a worker process ended before its cells were done") from None


def _cost(cell: Cell) -> int:
    return cell.length * cell.width * (1 if cell.model == "Transformer" else 4)


def _key(identity: dict) -> str:
    return json.dumps(identity, sort_keys=True)


def _append(path: Path, row: dict) -> None:
    with naming(path), path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _drop_cut_line(path: Path) -> None:
    """Cut off a half-written last line: a row behind it could not be read."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])
