"""Replayed calls have the bits of recorded ones, with scratch full of NaN, for new tensors of the same kind."""

from __future__ import annotations

import importlib

import cases
import pytest
import torch
from cases import DECAY, DELTA

from loglinear import DecodingState, log_linear_attention, log_linear_delta_rule
from loglinear.kernels import decay as scalar_gate
from loglinear.kernels import decoding
from loglinear.kernels import delta as delta_rule
from loglinear.kernels.tree import launching

pytestmark = pytest.mark.gpu


def make(device, delta: bool, T: int, seed: int, packed: bool) -> tuple[dict, torch.Tensor]:
    sizes = {"B": 1 if packed else 2, "T": T, "H": 4, "G": 2, "K": 64, "V": 64}
    x = cases.make(device, DELTA if delta else DECAY, **sizes, dtype=torch.bfloat16, seed=seed)
    do = cases.cotangent(x)
    if packed:
        x["cu_seqlens"] = torch.tensor([0, 70, 70, T - 1 - 10 * seed, T], device=device, dtype=torch.int32)
    return x, do


def noted_plays(monkeypatch) -> list:
    """A list that grows by one with each replayed call."""
    played, play = [], launching.play
    monkeypatch.setattr(launching, "play", lambda *arguments: played.append(1) or play(*arguments))
    return played


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("delta", "keep"), [(False, False), (True, False), (True, True)])
def test_same_bits(device, monkeypatch, delta, keep, packed, sliced):
    rule = delta_rule if delta else scalar_gate
    if keep:
        forward = importlib.import_module("loglinear.kernels.delta.forward")
        monkeypatch.setattr(forward, "keeps_maps", lambda problem, size: True)
    if sliced:
        monkeypatch.setattr(importlib.import_module("loglinear.kernels.delta.memory"), "UNSLICED", 0)

    def both(seed):
        x, do = make(device, delta, 1500, seed, packed)
        o, *kept = rule.forward(**x, keep=keep)
        assert bool(kept) == keep
        return [o, *rule.backward(do, **x, kept=tuple(kept))]

    recorded = []
    for seed in range(3):
        launching.plans_of.cache_clear()
        recorded.append(both(seed))
    played = noted_plays(monkeypatch)
    for seed, expected in enumerate(recorded):
        for got, want in zip(both(seed), expected):
            assert torch.equal(got, want)
    assert len(played) == 6, "the calls were not replayed"


@pytest.mark.parametrize("delta", [False, True])
def test_steps_of_same_bits(device, monkeypatch, delta):
    """At every position of two chunks and a bit, closings included; the state too."""
    x, _ = make(device, delta, 150, 0, packed=False)
    played = noted_plays(monkeypatch)

    def steps(recorded: bool):
        state = DecodingState.empty(2, 4, 2, 64, 64, 4096, torch.bfloat16, delta_rule=delta, device=device)
        outputs = []
        for t in range(150):
            if recorded:
                launching.plans_of.cache_clear()
            outputs.append(decoding.step(**{name: y[:, t : t + 1].clone() for name, y in x.items()}, state=state))
            state.position += 1
        return [torch.cat(outputs, 1), *state._tensors()]

    want = steps(recorded=True)
    assert not played
    launching.plans_of.cache_clear()
    got = steps(recorded=False)
    assert len(played) == 149
    for one, other in zip(got, want):
        assert torch.equal(one, other)


@pytest.mark.parametrize("delta", [False, True])
def test_forward_and_backward_in_a_cuda_graph(device, delta):
    """Of the public op, replayed with other inputs."""
    op = log_linear_delta_rule if delta else log_linear_attention
    (x, do), (other, _) = (make(device, delta, 300, seed, packed=False) for seed in (0, 1))
    inputs = [y.requires_grad_() for y in x.values()]

    def results():  # without their graph, which would tie the inputs to the stream of a capture
        o = op(**x)[0]
        return [y.detach() for y in (o, *torch.autograd.grad(o, inputs, do))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            results()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results()
    with torch.no_grad():
        for y, new in zip(inputs, other.values()):
            y.copy_(new)
    graph.replay()
    for got, want in zip(captured, results()):
        assert want.isfinite().all()
        assert torch.equal(got, want)
