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
import traceback
from collections.abc import Iterator
from itertools import islice
from multiprocessing import get_context
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from queue import Empty

import torch

from loglinear.tasks.mqar.config import Cell
from loglinear.tasks.mqar.run import read_rows
from loglinear.tasks.mqar.side_by_side import PAUSE
from recall_plan import STATE_SIZE, cell_of, wanted
from recall_report import lines
from stack_training import Turns, stack_training

Stacked = tuple[Cell, ...]
OUT_OF_MEMORY = 10.0  # seconds until a stack begins again that found no memory
CLOSING = 8.0  # seconds before the end at which workers stop: to write what they have


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0, help="of this call, its start included")
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="files with rows of earlier calls")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--at-once", type=int, default=2, help="stacks that take turns in one process")
    parser.add_argument("--stacks", type=int, help="no more than so many")
    parser.add_argument("--only", nargs="+", help="KIND/MODEL/START of the arms of width 32 that run, in their order")
    parser.add_argument("--half", action="store_true", help="begin stacks that will not end; the next call goes on")
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
    stacks, results, over = spawn.Queue(), spawn.Queue(), spawn.Event()
    settings = (options.device, options.at_once, options.out / "unfinished", stacks, results, over)
    crew = [spawn.Process(target=work, args=settings) for _ in range(options.workers)]
    for worker in crew:
        worker.start()
    given: list[Stacked] = []
    slowest = 0.0  # seconds of a stack: one that cannot end is not begun
    while time.monotonic() < until and any(worker.is_alive() for worker in crew):
        open_ones = [stack for stack in given if stack[0] not in rows]
        room = options.workers * options.at_once - len(open_ones)  # so that later ones keep the order of the plan
        new = [stack for stack in islice(chosen(rows, options.only), room + len(open_ones)) if stack not in open_ones]
        for stack in new[:room]:
            if len(given) != options.stacks and (options.half or time.monotonic() + slowest < until):
                stacks.put(stack)
                given.append(stack)
        if all(stack[0] in rows for stack in given):
            break
        try:
            found = [results.get(timeout=0.5)]
        except Empty:
            continue
        rows.update(found[0])
        slowest = max(slowest, *(row["seconds"] for _, row in found[0]))
        yield from found[0]
    over.set()
    stacks.cancel_join_thread()
    for worker in crew:
        worker.join(timeout=CLOSING)
        if worker.is_alive():
            worker.kill()
    while not results.empty():
        found = [results.get()]
        rows.update(found[0])
        yield from found[0]


def chosen(rows: dict[Cell, dict], only: list[str] | None) -> Iterator[Stacked]:
    """Stacks of the plan without rows; with ``only``, those of its arms in its order."""
    stacks = list(wanted(rows))
    if only is None:
        return iter(stacks)
    names = [f"{stack[0].kind}/{stack[0].model}/{stack[0].level_scale_start}" for stack in stacks]
    plain = [stack[0].width == 32 and stack[0].state_size == STATE_SIZE for stack in stacks]
    return iter([stack for arm in only for stack, name, one in zip(stacks, names, plain) if one and name == arm])


def work(device: str, at_once: int, unfinished: Path, stacks: Queue, results: Queue, over: Event) -> None:
    """Train stacks side by side until ``over`` is set; they take turns, so that their small kernels overlap."""
    torch.set_num_threads(1)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    unfinished.mkdir(exist_ok=True)
    running: list[tuple[Stacked, Turns]] = []
    waits: dict[Stacked, torch.cuda.Event | None] = {}
    compiled = device == "cuda"
    while not over.is_set():
        if len(running) < at_once and (stack := taken(stacks)) is not None:
            running.append((stack, stack_training(stack, device, compiled, state_file(unfinished, stack))))
        moved = False
        for stack, turns in list(running):
            event = waits.get(stack)
            if event is not None and not event.query():
                continue
            moved = True
            try:
                waits[stack] = next(turns)
            except StopIteration as end:
                running.remove((stack, turns))
                waits.pop(stack)
                results.put(list(zip(stack, end.value)))
                state_file(unfinished, stack).unlink(missing_ok=True)
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError):  # other processes may soon need less
                    time.sleep(OUT_OF_MEMORY)
                elif not compiled:
                    raise
                else:
                    compiled = False
                traceback.print_exc()
                running.remove((stack, turns))
                running.append((stack, stack_training(stack, device, compiled, state_file(unfinished, stack))))
        if not moved:
            time.sleep(PAUSE)
    for _, turns in running:
        turns.close()


def state_file(unfinished: Path, stack: Stacked) -> Path:
    identity = json.dumps([cell.identity() for cell in stack], sort_keys=True)
    return unfinished / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.pt"


def taken(stacks: Queue) -> Stacked | None:
    try:
        return stacks.get_nowait()
    except Empty:
        return None


if __name__ == "__main__":
    main()
