"""LevelScale: the formula, where it starts, and what weight decay leaves alone."""

import torch

from loglinear.layers import LevelScale


def test_formula():
    torch.manual_seed(0)
    module = LevelScale(hidden_size=6, num_heads=2, num_levels=3).double()
    assert torch.equal(module.L, torch.ones(2, 3, dtype=torch.float64))
    torch.nn.init.normal_(module.L)
    hidden = torch.randn(1, 4, 6, dtype=torch.float64)
    scales = module(hidden)
    for t in range(4):
        for head in range(2):
            for level in range(3):
                dl = module.dl_proj.weight[3 * head + level] @ hidden[0, t]
                want = torch.log1p(torch.exp(module.L[head, level] * dl))
                torch.testing.assert_close(scales[0, t, head, level], want, rtol=1e-12, atol=0)


def test_only_L_escapes_weight_decay():
    module = LevelScale(6, 2, 3)
    flagged = {name for name, parameter in module.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
    assert flagged == {"L"}
    module.L = torch.nn.Parameter(torch.zeros(2, 3))  # what a checkpoint loader does
    assert module.L._no_weight_decay
