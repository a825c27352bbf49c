"""Timing on a CUDA device, and rows of results as data.

A time is the median of ``triton.testing.do_bench``, which clears L2 before every repetition. All times are therefore cold. The
spread is the 20th and 80th percentile. Each row can be read without any other row or file.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """Short hash of the checkout, marked if it differs from the commit; "unknown" outside a repository."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> dict:
    """GPU, versions, commit and date: the columns that all rows of a run share."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def milliseconds(function: Callable[[], object], budget_ms: int = 200) -> tuple[float, float, float]:
    """(median, 20th percentile, 80th percentile) of one call, over about ``budget_ms`` of repetitions."""
    median, low, high = triton.testing.do_bench(function, warmup=50, rep=budget_ms, quantiles=[0.5, 0.2, 0.8])
    return median, low, high


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph: its replay takes the host next to nothing, so that only the GPU's work is timed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay() -> object:
        graph.replay()
        return results

    return replay


def peak_bytes(function: Callable[[], object]) -> int:
    """Largest number of bytes allocated during one call, above what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def append(name: str, rows: list[dict], folder: Path = RESULTS) -> Path:
    """Append rows to ``<folder>/<name>.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path
