"""Every kind of gate, up to hard resets."""

from __future__ import annotations

import pytest
import torch
from cases import INTERPRETED, check, make, run

T = 60 if INTERPRETED else 1500


@pytest.mark.parametrize("gate", ["none", "zero", "strong", "very negative", "reset"])
def test_gates(device, gate):
    check(device, T=150 if INTERPRETED and gate == "reset" else T, gate=gate)


def test_a_reset_forgets_exactly(device):
    """After g = -inf nothing of what came before is left, not even its rounding."""
    x = make(device, T=T)
    cut = T // 2 + 3
    x["g"][:, cut] = float("-inf")
    do = torch.ones_like(x["v"])
    before = run(x, do)[0]
    x["v"][:, :cut] *= 1000
    after = run(x, do)[0]
    assert torch.equal(before[:, cut:], after[:, cut:])
    assert not torch.equal(before[:, :cut], after[:, :cut])


def test_gradient_of_a_reset_is_zero(device):
    x = make(device, T=T)
    x["g"][:, 40] = float("-inf")
    dg = run(x, torch.ones_like(x["v"]))[4]
    assert (dg[:, 40] == 0).all()
    assert (dg[:, 41:] != 0).any()
