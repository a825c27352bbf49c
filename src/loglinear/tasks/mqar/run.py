"""A grid from its first cell to its last, by worker processes that train one model each; interrupted, it goes on.

Special about this file: the rows file is the only memory. A row is appended when its cell is done, and a cell whose row is
there is skipped, so any part of a grid can be run at any time, in any order, by any number of workers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch

from loglinear.tasks.mqar.config import Cell, Grid
from loglinear.tasks.mqar.report import best_rate
from loglinear.tasks.mqar.train import train_cell


def read_rows(path: Path) -> list[dict]:
    """The rows in ``path``, none if there is no such file; a last line that a killed process cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def run_grid(grid: Grid, path: Path, workers: int, device: str, on_row: Callable[[dict, int, int], None]) -> list[dict]:
    """Train what ``path`` does not have yet, ``workers`` models at a time; returns the rows of the grid's seeds and rates.

    ``on_row(row, done, total)`` is called for every new row of one of the two stages: the sweep of the learning rate with
    the first seed, and the other seeds at each model's best one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_cut_line(path)
    sweeps = list(grid.sweeps())
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _start_worker, (workers, device, spawn.Value("i", 0))) as pool:
        swept = _run(pool, [cell for sweep in sweeps for cell in sweep], path, device, on_row)
        chosen = [
            replace(sweep[0], learning_rate=best_rate([swept[_key(cell.identity())] for cell in sweep]))
            for sweep in sweeps
        ]
        others = [replace(cell, seed=seed) for cell in chosen for seed in grid.seeds[1:]]
        return [*swept.values(), *_run(pool, others, path, device, on_row).values()]


def _run(
    pool: ProcessPoolExecutor,
    cells: Iterable[Cell],
    path: Path,
    device: str,
    on_row: Callable[[dict, int, int], None],
) -> dict[str, dict]:
    wanted = {_key(cell.identity()): cell for cell in cells}
    rows = {key: row for row in read_rows(path) if (key := _key(row["cell"])) in wanted}
    # The longest first, so that no worker is left alone with one at the end.
    missing = sorted((cell for key, cell in wanted.items() if key not in rows), key=lambda cell: -cell.length)
    futures = {pool.submit(train_cell, cell, device): cell for cell in missing}
    try:
        for future in as_completed(futures):
            row = {"cell": futures[future].identity(), **future.result()}
            _append(path, row)
            rows[_key(row["cell"])] = row
            on_row(row, len(rows), len(wanted))
    finally:
        for future in futures:
            future.cancel()
    return {key: rows[key] for key in wanted}


def _key(identity: dict) -> str:
    return json.dumps(identity, sort_keys=True)


def _append(path: Path, row: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _drop_cut_line(path: Path) -> None:
    """A row after a half-written line would be lost with it."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])


def _start_worker(workers: int, device: str, started: Synchronized) -> None:
    """A worker's share of the cores, and its GPU: they take turns."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    if device == "cuda":
        with started.get_lock():
            number, started.value = started.value, started.value + 1
        torch.cuda.set_device(number % torch.cuda.device_count())
