"""Prefill: the kernels' output with the state beside it, continued token by token, against one pass."""

from __future__ import annotations

import dataclasses
import importlib
from functools import lru_cache

import cases
import pytest
import torch
from cases import DECAY, FLOAT32, INTERPRETED, relative, wide

from loglinear import log_linear_attention
from loglinear.kernels import tuning
from loglinear.kernels.tree import launching
from loglinear.reference.chunkwise import chunkwise
from loglinear.state import CHUNK_SIZE, joined
from oracle import gradients

pytestmark = pytest.mark.usefixtures("on_the_kernels")
FIELDS = ("entries", "decay", "open_k", "open_v", "open_g")


def make(device, length, seed=0):
    return cases.make(device, DECAY, T=length, H=2, L=11, seed=seed)


def part(x, tokens):
    return {name: y[:, tokens] for name, y in x.items()}


@pytest.mark.parametrize("packed", [False, True])
def test_many_tokens_after_a_state(device, packed):
    """Outputs, the next state, and gradients into and out of states, of rows that stand at different positions."""
    before, after = ((64, 7, 200), (66, 0, 130)) if packed else ((70, 331), (130, 130))
    if INTERPRETED:
        after = (10, 0, 60) if packed else (60, 60)
    rows = [make(device, a + b, seed) for seed, (a, b) in enumerate(zip(before, after))]
    whole = joined([chunkwise(**wide(part(x, slice(n))))[1] for x, n in zip(rows, before)])
    new = [part(x, slice(n, None)) for x, n in zip(rows, before)]
    inputs = {name: torch.cat([x[name] for x in new], 1 if packed else 0) for name in DECAY.inputs}
    bounds = torch.tensor([0, *after], device=device).cumsum(0) if packed else None
    results = []
    for x, state in ((inputs, whole.to(dtype=torch.float32)), (wide(inputs), whole)):
        x = {name: y.requires_grad_() for name, y in x.items()}
        state = state._map(lambda y: y.detach().requires_grad_(y.is_floating_point()))
        if x["q"].dtype == torch.float64:
            o, final = chunkwise(**x, state=state, lengths=after)
        else:
            o, final = log_linear_attention(**x, initial_state=state, cu_seqlens=bounds, output_final_state=True)
        made = [o, *(getattr(final, name) for name in FIELDS)]
        leaves = [*x.values(), *(getattr(state, name) for name in FIELDS)]
        results.append([final.position, *made, *gradients(made, leaves)])
    assert torch.equal(results[0][0], results[1][0])
    for got, want in zip(*(found[1:] for found in results)):
        assert relative(got, want) <= FLOAT32


@pytest.mark.parametrize("chunk", [16 if INTERPRETED else 32, 64, 128])
def test_kernels_go_on_in_chunks_that_fit_the_state(device, chunk, monkeypatch):
    """Any that divide the state's 64 tokens. In longer ones, which then began at the wrong tokens, the error was 30%."""
    x = make(device, 150 if INTERPRETED else 300)
    whole, _ = chunkwise(**wide(x))
    _, state = chunkwise(**part(x, slice(70)))
    config = dataclasses.replace(tuning.float32_config(16), chunk=chunk)
    file = importlib.import_module("loglinear.kernels.decay.forward")
    monkeypatch.setattr(file, "scalar_gate_config", lambda *kind: config)
    monkeypatch.setattr(launching, "plans_of", lru_cache(lambda *kind: []))  # a plan knows the tiles of its first call
    new = [y.requires_grad_() for y in part(x, slice(70, None)).values()]
    if chunk > CHUNK_SIZE:
        with pytest.raises(ValueError, match=r"config.chunk must divide .* of 64 tokens .* got 128"):
            log_linear_attention(*new, initial_state=state)
        return
    o, _ = log_linear_attention(*new, initial_state=state)
    assert (o.double() - whole[:, 70:]).norm() <= FLOAT32 * whole.norm()
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), new))
