"""Kernels against float64: on a CUDA device where there is one, otherwise in Triton's interpreter.

The interpreter must be chosen before triton is imported, and the choice is final. Without a GPU, only
tests/kernels/test_interpreter.py collects the files of this folder, and runs them in processes of their own.
"""

from __future__ import annotations

import os

import pytest
import torch

from loglinear.ops import checks, dispatch

if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    collect_ignore_glob = ["test_*.py"]

GUARD = 128  # elements on either side of every allocation


def pytest_runtest_setup(item):
    if not torch.cuda.is_available() and item.get_closest_marker("gpu"):
        pytest.skip("needs a CUDA device, or minutes in the interpreter")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def on_the_kernels(monkeypatch, device):
    """The public ops run the kernels, in the interpreter too."""
    if device.type == "cpu":
        monkeypatch.setattr(dispatch, "attention", lambda inputs, backend="auto": True)
        monkeypatch.setattr(checks, "_known", {})


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    """All memory that the kernels get is full of NaN, inside guard bands that must still be whole after the test."""
    from loglinear.kernels.tree import launching

    buffers = []

    def memory(shape, dtype, device):
        size = torch.Size(shape).numel()
        nan = (
            float("nan") if dtype.is_floating_point else 255
        )  # all bits of a replayed call's scratch: NaN in every dtype
        buffer = torch.full((size + 2 * GUARD,), nan, dtype=dtype, device=device)
        buffer[:GUARD] = buffer[GUARD + size :] = 7
        buffers.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(shape)

    monkeypatch.setattr(launching, "memory", memory)
    yield
    for buffer, size in buffers:
        assert (buffer[:GUARD] == 7).all(), "a kernel wrote before its tensor"
        assert (buffer[GUARD + size :] == 7).all(), "a kernel wrote after its tensor"
