"""The linear models (``level_scales=None``) on the kernels: a tree whose levels share one λ = 1."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import INTERPRETED

from loglinear import log_linear_attention, log_linear_delta_rule
from loglinear.ops import dispatch
from loglinear.ops import forward as module
from loglinear.reference.chunkwise import chunkwise

T = 150 if INTERPRETED else 1000


@pytest.fixture(autouse=True)
def on_the_kernels(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(dispatch, "attention", lambda inputs, backend="auto": True)


@pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
def test_output_and_gradients(device, delta, monkeypatch):
    used = []
    apply = module.by_kernels
    monkeypatch.setattr(module, "by_kernels", lambda *inputs: used.append(True) or apply(*inputs))
    generator = torch.Generator("cpu").manual_seed(0)
    q, k, v, g = (
        torch.randn(shape, generator=generator) for shape in ((2, T, 1, 16),) * 2 + ((2, T, 2, 16), (2, T, 2))
    )
    rate = [torch.rand((2, T, 2), generator=generator)] if delta else []
    inputs = [q, F.normalize(k, dim=-1) if delta else k, v, -0.1 * g.abs(), *rate]
    inputs = [x.to(device).requires_grad_() for x in inputs]
    o, _ = (log_linear_delta_rule if delta else log_linear_attention)(*inputs, None)
    assert used
    wide = [x.detach().double().requires_grad_() for x in inputs]
    want, _ = chunkwise(*wide[:4], None, *wide[4:])
    gradient = torch.randn(o.shape, generator=generator).to(device)
    got, expected = torch.autograd.grad(o, inputs, gradient), torch.autograd.grad(want, wide, gradient.double())
    for x, reference in zip((o, *got), (want, *expected), strict=True):
        assert (x.double() - reference).norm() <= 1e-5 * reference.norm()
