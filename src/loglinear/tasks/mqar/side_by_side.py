"""Cells that train side by side in one process, one turn each at a time, and the worker processes around them.

A turn only launches work, on a stream of its cell, so small kernels of different cells overlap on the GPU. A worker takes a new
cell from the queue when one of its own is done, so all workers end at about the same time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from queue import Empty

import torch

from loglinear.tasks.mqar.config import Cell
from loglinear.tasks.mqar.train import Training, training

PAUSE = 0.001  # seconds to the next look while every cell waits for the device


@dataclass(eq=False)
class _Running:
    cell: Cell
    turns: Training
    until: torch.cuda.Event | None = None


def side_by_side(
    cells: Iterator[Cell | None],
    at_once: int,
    device: str,
    over: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Cell, dict]]:
    """(cell, row) of every cell as it ends. ``at_once`` cells take turns until ``over`` says so.

    None among ``cells`` says that the next cell is not known yet.
    """
    running: list[_Running] = []
    more = True
    while (more or running) and not over():
        moved = False
        # One new cell a round: its start takes time, and the queues of the others run dry.
        if more and len(running) < at_once:
            try:
                cell = next(cells)
            except StopIteration:
                more = False
            else:
                if cell is not None:
                    running.append(_Running(cell, training(cell, device)))
        for one in list(running):
            if one.until is not None and not one.until.query():
                continue
            moved = True
            try:
                one.until = next(one.turns)
            except StopIteration as end:
                running.remove(one)
                yield one.cell, end.value
        if not moved:
            time.sleep(PAUSE)
    for one in running:
        one.turns.close()


@dataclass
class Share:
    """The arguments of a worker process."""

    device: str
    workers: int
    at_once: int
    started: Synchronized
    """Counts the workers."""
    cells: Queue
    """Cells to train."""
    rows: Queue
    """(cell, row) of those that are done."""
    over: Event
    """Set when nothing is to be trained any more."""


_share: Share  # of this process


def start_worker(share: Share) -> None:
    """A worker's share of the cores, and its GPU."""
    global _share
    _share = share
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // share.workers))
    if share.device == "cuda":
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # otherwise only eight streams overlap
        with share.started.get_lock():
            number, share.started.value = share.started.value, share.started.value + 1
        torch.cuda.set_device(number % torch.cuda.device_count())


def work() -> None:
    """Train cells of the queue until it is over; unfinished cells are given up."""
    for result in side_by_side(_taken(_share.cells), _share.at_once, _share.device, _share.over.is_set):
        _share.rows.put(result)


def _taken(queue: Queue) -> Iterator[Cell | None]:
    while True:
        try:
            yield queue.get_nowait()
        except Empty:
            yield None
