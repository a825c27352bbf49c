"""Prefill: the kernels' output with the state beside it, continued token by token, against one pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import INTERPRETED

from loglinear import log_linear_attention
from loglinear.ops import registration
from loglinear.reference.chunkwise import chunkwise
from loglinear.state import LogLinearState

T, MORE = (70, 3) if INTERPRETED else (1000, 70)


@pytest.fixture(autouse=True)
def on_the_kernels(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(registration, "has_kernel", lambda q, v, beta: True)


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


def separate(state):
    """The same state in float64, whose entries and open values are leaves of a graph."""
    fields = ("entries", "open_k", "open_v", "open_g")
    return dataclasses.replace(state.to(dtype=torch.float64), decay=state.decay.double(), **{
        name: getattr(state, name).detach().double().requires_grad_() for name in fields
    })  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_many_tokens_after_a_state(device, packed):
    """Outputs, the next state, and gradients into and out of states, of rows that stand at different positions."""
    before, after = ((64, 7, 200), (66, 0, 130)) if packed else ((70, 331), (130, 130))
    size = [a + b for a, b in zip(before, after)]
    rows = [make(device, n, seed) for seed, n in enumerate(size)]
    states = [chunkwise(*(x[:, :n].double() for x in row))[1] for row, n in zip(rows, before)]
    slots = max(x.entries.shape[1] for x in states)
    whole = LogLinearState(
        *(torch.cat([grown(getattr(x, name), slots) for x in states]) for name in ("position", "entries", "decay")),
        *(torch.cat([getattr(x, name) for x in states]) for name in ("open_k", "open_v", "open_g")),
    )
    new = [[x[:, n:] for x in row] for row, n in zip(rows, before)]
    inputs = [torch.cat(parts, 1 if packed else 0).requires_grad_() for parts in zip(*new)]
    bounds = torch.tensor([0, *after], device=device).cumsum(0) if packed else None
    narrow, wide_state = separate(whole), separate(whole)
    leaves = [narrow.entries, narrow.open_k, narrow.open_v, narrow.open_g]
    given = narrow.to(dtype=torch.float32)
    given = dataclasses.replace(given, open_g=narrow.open_g.float(), decay=narrow.decay.float())
    o, state = log_linear_attention(*inputs, initial_state=given, cu_seqlens=bounds, output_final_state=True)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    lengths = after
    want, expected = chunkwise(*wide, state=wide_state, lengths=lengths)
    assert torch.equal(state.position, expected.position)
    names = ("entries", "decay", "open_k", "open_v", "open_g")
    pairs = [(o, want), *((getattr(state, name), getattr(expected, name)) for name in names)]
    weights = [torch.randn_like(x) for _, x in pairs]
    loss, wide_loss = (sum((w * pair[i]).sum() for w, pair in zip(weights, pairs)) for i in (0, 1))
    wide_leaves = [wide_state.entries, wide_state.open_k, wide_state.open_v, wide_state.open_g]
    got = torch.autograd.grad(loss, [*inputs, *leaves])
    pairs += zip(got, torch.autograd.grad(wide_loss, [*wide, *wide_leaves]))
    for x, reference in pairs:
        assert (x.double() - reference).norm() <= 1e-5 * reference.norm()


def grown(x, slots):
    """x ``[1]`` or ``[1, M, ...]`` with that many slots."""
    return x if x.dim() == 1 else torch.cat([x, x.new_zeros(1, slots - x.shape[1], *x.shape[2:])], 1)
