"""Several processes for a test, joined by gloo: forked from a server that has imported torch once, so that they cost little."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

PRELOADED = ["torch.distributed", "loglinear.training.run"]
WAIT = 120  # seconds: a rank that left a collective out makes the others wait


def on_ranks(count: int, function: Callable, *args) -> list:
    """``function(rank, *args)`` of ``count`` processes, each in its own, and what they return (tensors as values)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(count):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(sending, rank, count, port, function, args), daemon=True)
        process.start()
        sending.close()
        pipes.append(receiving)
        processes.append(process)
    try:
        results: list = [None] * count
        waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
        while waiting:
            ended = wait(waiting, WAIT)
            assert ended, f"ranks {sorted(waiting.values())} did not end"
            for pipe in ended:
                done, result = pipe.recv()
                assert done, result  # the others may wait for this rank for ever
                results[waiting.pop(pipe)] = result
    finally:
        for process in processes:
            process.kill()
            process.join()
    return results


def _run(sending, rank: int, count: int, port: int, function: Callable, args: tuple) -> None:
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    try:
        result = True, function(rank, *args)
    except BaseException:
        result = False, f"rank {rank}: {traceback.format_exc()}"
    sending.send(_plain(result))
    sending.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _plain(x):
    """Tensors as arrays: they travel as bytes, not as files of a process that is gone."""
    if isinstance(x, torch.Tensor):
        x = x.detach()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    return type(x)(_plain(value) for value in x) if isinstance(x, (tuple, list)) else x
