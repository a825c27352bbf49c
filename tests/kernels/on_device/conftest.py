"""Kernels against float64: on a CUDA device where there is one, otherwise in Triton's interpreter.

The interpreter must be chosen before triton is imported, and the choice is final. Without a GPU, only
tests/kernels/test_interpreter.py collects the files of this folder, and runs them in processes of their own.
"""

from __future__ import annotations

import os

import pytest
import torch

from loglinear.ops import checks, dispatch, fused, pointwise

if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    collect_ignore_glob = ["test_*.py"]


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


@pytest.fixture
def steps_on_the_kernels(monkeypatch, device):
    """The steps of layers run the kernels, in the interpreter too."""
    if device.type == "cpu":
        monkeypatch.setattr(fused, "fits", lambda x, *others: x.dtype != torch.float64)
        monkeypatch.setattr(pointwise, "on_device", lambda x: True)
        monkeypatch.setattr(dispatch, "step", lambda q, v, *rest: v.dtype != torch.float64)


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    """All memory that the kernels get is full of NaN, inside guard bands that must still be whole after the test."""
    from guarded import guarded_memory  # which imports Triton

    with guarded_memory(monkeypatch):
        yield
