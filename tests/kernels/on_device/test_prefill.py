"""Prefill: the kernels' output with the state beside it, continued token by token, against one pass."""

from __future__ import annotations

import pytest
import torch
from cases import INTERPRETED

from loglinear import log_linear_attention
from loglinear.ops import registration
from loglinear.reference.chunkwise import chunkwise

T, MORE = (70, 3) if INTERPRETED else (1000, 70)


@pytest.fixture(autouse=True)
def on_the_kernels(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(registration, "has_kernel", lambda q, v, beta, scales: True)


def make(device, length, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    shapes = ((1, length, 1, 16), (1, length, 1, 16), (1, length, 2, 16), (1, length, 2), (1, length, 2, 11))
    q, k, v, g, scales = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to(device) for x in (q, k, v, -0.1 * g.abs(), scales)]


@pytest.mark.parametrize("packed", [False, True])
def test_output_state_and_their_gradients(device, packed):
    inputs = [x.requires_grad_() for x in make(device, T)]
    lengths = (T // 3, T - T // 3) if packed else (T,)
    bounds = torch.tensor([0, *lengths], device=device, dtype=torch.int32).cumsum(0).to(torch.int32) if packed else None
    o, state = log_linear_attention(*inputs, cu_seqlens=bounds, output_final_state=True)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    want, expected = chunkwise(*wide, lengths=lengths)
    loss = o.sum() + state.entries.square().sum() + state.open_v.sum()
    wide_loss = want.sum() + expected.entries.square().sum() + expected.open_v.sum()
    pairs = [(o, want), (state.entries, expected.entries), (state.open_k, expected.open_k)]
    pairs += zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(wide_loss, wide))
    for got, reference in pairs:
        assert (got.double() - reference).norm() <= 1e-5 * reference.norm()


def test_continued(device):
    inputs = make(device, T + MORE)
    whole, _ = chunkwise(*(x.double() for x in inputs))
    o, state = log_linear_attention(*(x[:, :T] for x in inputs), output_final_state=True)
    outputs = [o]
    for t in range(T, T + MORE):
        o, state = log_linear_attention(
            *(x[:, t : t + 1] for x in inputs), initial_state=state, output_final_state=True
        )
        outputs.append(o)
    got = torch.cat(outputs, 1).double()
    assert (got - whole).norm() <= 1e-5 * whole.norm()
