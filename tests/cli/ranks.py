"""Processes of one group without torchrun: forked from a server that has imported everything once, so each costs little."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["loglinear.training.run", "loglinear.cli.train"])


def process_of(options: list[str], printed: Path | None = None) -> multiprocessing.process.BaseProcess:
    """The command line in a process of its own, which has started. What it prints goes to the file ``printed``."""
    process = CONTEXT.Process(target=_command, args=(options, printed))
    process.start()
    return process


def _command(options: list[str], printed: Path | None) -> None:
    from loglinear.cli import main

    if printed is not None:
        for stream in (1, 2):
            os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.stdout.reconfigure(line_buffering=True)
    raise SystemExit(main(options))


def run_ranks(function: Callable[..., None], processes: int, *arguments, killed: int | None = None) -> None:
    """Call ``function(*arguments)`` in that many processes, each with the environment that torchrun would give it.

    All must end well, but for ``killed``, which must die of SIGKILL.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = [
        CONTEXT.Process(target=_as_rank, args=(rank, processes, port, function, arguments)) for rank in range(processes)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
    codes = [process.exitcode for process in group]
    for process in group:
        process.kill()
    assert codes == [0 if rank != killed else -9 for rank in range(processes)]


def _as_rank(rank: int, processes: int, port: int, function: Callable[..., None], arguments: tuple) -> None:
    import torch
    from torch import distributed

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    function(*arguments)
    if distributed.is_initialized():
        distributed.destroy_process_group()
