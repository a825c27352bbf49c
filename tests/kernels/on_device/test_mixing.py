"""A Log-Linear Mamba-2 mixer between its projections as one operator: the numbers of its lines, eager and compiled."""

from __future__ import annotations

import pytest
import torch
from cases import FLOAT32, INTERPRETED, LOW_PRECISION_FACTOR, relative
from functorch.compile import make_boxed_func
from test_pointwise import mixer_results, mixers, normal
from torch._dynamo.backends.common import aot_autograd

from loglinear.kernels.pointwise import convolution
from loglinear.layers import LogLinearMamba2, linear
from loglinear.ops import dispatch, mixing, pointwise

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at inputs
T = 6 if INTERPRETED else 700


@pytest.fixture(autouse=True)
def on_the_kernels(monkeypatch):
    """As on a GPU with many tokens."""
    monkeypatch.setattr(linear, "many", lambda input: True)
    if INTERPRETED:
        monkeypatch.setattr(convolution, "SPAN", 8)
        monkeypatch.setattr(pointwise, "on_device", lambda x: True)
        monkeypatch.setattr(dispatch, "on_kernels", lambda *given: True)
        monkeypatch.setattr(
            LogLinearMamba2, "_mixes_whole", lambda self, hidden: self.in_multiplier == 1
        )  # with a plain op


@pytest.fixture
def used(monkeypatch):
    """Calls of the operator."""
    calls, run = [], mixing.mamba2
    monkeypatch.setattr(mixing, "mamba2", lambda *given: calls.append(given) or run(*given))
    return calls


def inputs(device, kind):
    """(mixer, hidden, gradient, whether under autocast, offsets)"""
    mixer = mixers()["mamba2"].to(device)
    hidden = normal(device, *((1, 2 * T) if kind == "packed" else (2, T)), 24)
    offsets = torch.tensor([0, 4, 4, 2 * T], device=device) if kind == "packed" else None
    return mixer, hidden, normal(device, *hidden.shape, seed=1), kind == "autocast", offsets


@pytest.mark.parametrize("kind", ["autocast", "packed"])
def test_the_numbers_of_the_lines(device, kind, used, monkeypatch):
    """The output and every gradient, against float64 and beside the lines; there are columns that only pad the projections."""
    mixer, hidden, *others = inputs(device, kind)
    got = mixer_results(mixer, hidden, *others)
    assert len(used) == 1
    monkeypatch.setattr(LogLinearMamba2, "whole", lambda *given: None)
    lines = mixer_results(mixer, hidden, *others)
    gradient, low, offsets = others
    want = mixer_results(mixer.double(), hidden.double(), gradient.double(), False, offsets)
    for x, y, z in zip(got, lines, want, strict=True):
        assert x.dtype == y.dtype
        assert relative(x, z) <= (LOW_PRECISION_FACTOR * relative(y, z) if low else FLOAT32)


def test_compiled(device, compiled, used):
    """One operator each way, no gradient that is put together from parts, and the bits of eager code."""
    given, targets = inputs(device, "autocast"), []

    def note(graph, example):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph)

    function = compiled(given[0], backend=aot_autograd(fw_compiler=note, bw_compiler=note))
    got = mixer_results(function, *given[1:])
    assert [x for x in targets if x.startswith("loglinear")] == [
        "loglinear.mamba2.default",
        "loglinear.mamba2_backward.default",
    ]
    assert sum("cat" in x for x in targets) == 1, "the weights"
    assert not any("slice_backward" in x or "clone" in x for x in targets)
    for x, y in zip(got, mixer_results(*given), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y) or not INTERPRETED


def test_calls_of_the_lines(device, used):
    """Nothing recorded; a state that is asked for; a field that no kernel knows."""
    mixer, hidden, *_ = inputs(device, "autocast")
    with torch.no_grad():
        mixer(hidden)
    mixer(hidden, output_state=True)
    mixer.in_multiplier = 2.0
    mixer(hidden)
    assert not used
