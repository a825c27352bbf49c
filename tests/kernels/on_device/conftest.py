"""Kernels against float64: on a CUDA device where there is one, otherwise in Triton's interpreter.

The interpreter must be chosen before triton is imported, and the choice is final. Without a GPU, only
tests/kernels/test_interpreter.py collects the files of this folder, and runs them in processes of their own.
"""

from __future__ import annotations

import os

import pytest
import torch

if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    collect_ignore_glob = ["test_*.py"]

GUARD = 128  # elements on either side of every allocation


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    """All memory that the kernels get is full of NaN, inside guard bands that must still be whole after the test."""
    from loglinear.kernels.tree import launching

    buffers = []

    def scratch(shape, dtype, device):
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
        buffer[:GUARD] = buffer[GUARD + size :] = 7.0
        buffers.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(shape)

    monkeypatch.setattr(launching, "scratch", scratch)
    yield
    for buffer, size in buffers:
        assert (buffer[:GUARD] == 7.0).all(), "a kernel wrote before its tensor"
        assert (buffer[GUARD + size :] == 7.0).all(), "a kernel wrote after its tensor"
