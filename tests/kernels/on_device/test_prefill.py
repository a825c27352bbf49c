"""Prefill: the kernels' output with the state beside it, continued token by token, against one pass."""

from __future__ import annotations

import dataclasses
import importlib
from functools import lru_cache

import cases
import pytest
import torch
from cases import DECAY, FLOAT32, INTERPRETED

from loglinear import log_linear_attention
from loglinear.kernels import tuning
from loglinear.kernels.tree import launching
from loglinear.reference.chunkwise import chunkwise
from loglinear.state import CHUNK_SIZE, joined

pytestmark = pytest.mark.usefixtures("on_the_kernels")


def make(device, length, seed=0):
    return list(cases.make(device, DECAY, T=length, H=2, L=11, seed=seed).values())


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
    if INTERPRETED:
        after = (10, 0, 60) if packed else (60, 60)
    size = [a + b for a, b in zip(before, after)]
    rows = [make(device, n, seed) for seed, n in enumerate(size)]
    states = [chunkwise(*(x[:, :n].double() for x in row))[1] for row, n in zip(rows, before)]
    whole = joined(states)
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
        assert (x.double() - reference).norm() <= FLOAT32 * reference.norm()


@pytest.mark.parametrize("chunk", [16 if INTERPRETED else 32, 64, 128])
def test_kernels_go_on_in_chunks_that_fit_the_state(device, chunk, monkeypatch):
    """Any that divide the state's 64 tokens. In longer ones, which then began at the wrong tokens, the error was 30%."""
    inputs = make(device, 150 if INTERPRETED else 300)
    whole, _ = chunkwise(*(x.double() for x in inputs))
    _, state = chunkwise(*(x[:, :70] for x in inputs))
    config = dataclasses.replace(tuning.float32_config(16), chunk=chunk)
    file = importlib.import_module("loglinear.kernels.decay.forward")
    monkeypatch.setattr(file, "scalar_gate_config", lambda *kind: config)
    monkeypatch.setattr(launching, "plans_of", lru_cache(lambda *kind: []))  # a plan knows the tiles of its first call
    new = [x[:, 70:].requires_grad_() for x in inputs]
    if chunk > CHUNK_SIZE:
        with pytest.raises(ValueError, match=r"config.chunk must divide .* of 64 tokens .* got 128"):
            log_linear_attention(*new, initial_state=state)
        return
    o, _ = log_linear_attention(*new, initial_state=state)
    assert (o.double() - whole[:, 70:]).norm() <= FLOAT32 * whole.norm()
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), new))
