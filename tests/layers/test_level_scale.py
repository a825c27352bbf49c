"""LevelScale: the formula, where it starts, and what weight decay leaves alone."""

import math

import pytest
import torch

from loglinear.layers import LevelScale


@pytest.mark.parametrize(("start", "offset"), [("paper", 0.0), ("one", math.log(math.e - 1))])
def test_formula(start, offset):
    torch.manual_seed(0)
    module = LevelScale(hidden_size=6, num_heads=2, num_levels=3, start=start).double()
    torch.nn.init.normal_(module.dl_proj.weight)
    assert torch.equal(module.L, torch.ones(2, 3, dtype=torch.float64))
    torch.nn.init.normal_(module.L)
    hidden = torch.randn(1, 4, 6, dtype=torch.float64)
    scales = module(hidden)
    for t in range(4):
        for head in range(2):
            for level in range(3):
                dl = module.dl_proj.weight[3 * head + level] @ hidden[0, t]
                want = torch.log1p(torch.exp(module.L[head, level] * dl + offset))
                torch.testing.assert_close(scales[0, t, head, level], want, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("start", "value"), [("paper", math.log(2)), ("one", 1.0)])
def test_where_it_starts(start, value):
    """Within the noise of a projection of 0.006, and exactly there where the projection gives nothing."""
    torch.manual_seed(0)
    module = LevelScale(hidden_size=256, num_heads=4, num_levels=15, start=start)
    assert module.dl_proj.weight.std().item() == pytest.approx(0.006, rel=0.05)
    scales = module(torch.randn(1, 50, 256))
    assert scales.mean().item() == pytest.approx(value, abs=0.01)
    assert scales.std() < 0.07
    nothing = module.double()(torch.zeros(1, 1, 256, dtype=torch.float64))
    torch.testing.assert_close(nothing, torch.full_like(nothing, value), rtol=0, atol=1e-15)
    scales.sum().backward()
    assert (module.dl_proj.weight.grad != 0).any()
    assert (module.L.grad != 0).all()


def test_an_unknown_start_is_named():
    with pytest.raises(ValueError, match=r"start must be one of \['paper', 'one'\]: got 'ones'"):
        LevelScale(6, 2, 3, start="ones")


def test_only_L_escapes_weight_decay():
    module = LevelScale(6, 2, 3)
    flagged = {name for name, parameter in module.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
    assert flagged == {"L"}
    module.L = torch.nn.Parameter(torch.zeros(2, 3))  # what a checkpoint loader does
    assert module.L._no_weight_decay
