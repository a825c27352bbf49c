"""A decoder's layer on a token in four products, against its plain lines and against float64; and which calls it takes."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import BFLOAT16, INTERPRETED, LOW_PRECISION_FACTOR, relative
from transformers import StaticCache

from loglinear.models import LogLinearConfig, LogLinearForCausalLM, token
from loglinear.models.layout import plan_layout
from loglinear.ops import products

EVERY = ["log_linear_mamba2", "log_linear_gated_deltanet", "log_linear_kda", "mamba2"]
MIXERS = EVERY[:1] if INTERPRETED else EVERY
SIZES = {"mamba_head_dim": 16, "mamba_state_size": 16, "delta_num_heads": 2, "kda_num_heads": 2}


pytestmark = pytest.mark.usefixtures("steps_on_the_kernels")


def make(mixer, device):
    torch.manual_seed(0)
    config = LogLinearConfig(
        mixer=mixer, hidden_size=32, num_hidden_layers=1, vocab_size=40, initializer_range=0.3, **SIZES
    )
    model = LogLinearForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(device, BFLOAT16), torch.randint(40, (2, 6 if INTERPRETED else 8), device=device)


def steps(model, ids):
    """Logits of tokens one by one behind a prompt of five."""
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(ids[:, :5], past_key_values=cache)
    return torch.cat([model(x, past_key_values=cache).logits for x in ids[:, 5:].split(1, dim=1)], dim=1).double()


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_a_layer_of_a_token(device, mixer, monkeypatch):
    """The kernels' error against float64, output layer included, is at most twice the error of the plain lines."""
    (model, ids), used, run = make(mixer, device), [], token.forward
    widths, project = [], products.projected
    exact = copy.deepcopy(model).double()(ids, use_cache=False).logits[:, 5:]
    monkeypatch.setattr(token, "forward", lambda *args: used.append(args[1].shape) or run(*args))
    monkeypatch.setattr(
        products, "projected", lambda x, first, *rest: widths.append(len(first)) or project(x, first, *rest)
    )
    got = steps(model, ids)
    assert widths.count(40) == got.shape[1]
    assert used == [(2, 1, 32)] * got.shape[1]
    if not INTERPRETED:
        assert torch.equal(got, steps(model, ids))
    monkeypatch.setattr(products, "ENABLED", False)
    plain = steps(model, ids)
    assert len(used) == got.shape[1] * (1 if INTERPRETED else 2)
    assert relative(got, exact) <= LOW_PRECISION_FACTOR * relative(plain, exact)


@torch.no_grad()
def test_calls_that_run_line_by_line(device, monkeypatch):
    """Each has a reason of its own."""
    model, ids = make("log_linear_mamba2", device)
    cache, block = StaticCache(config=model.config, max_cache_len=64), model.model.layers[0]
    layout, held = plan_layout(2, 1), cache.layers[0]

    def reason(hidden=None, layout=layout):
        return token.why_not(block, model.model.embed_tokens(ids[:, :1]) if hidden is None else hidden, layout, held)

    assert "start" in reason()
    model(ids, past_key_values=cache)
    assert reason() is None
    assert "rows" in reason(torch.zeros(2, 5, 32, dtype=BFLOAT16, device=device))
    assert "padding" in reason(layout=plan_layout(2, 1, torch.tensor([[1], [0]], device=device)))
    assert "float32" in reason(torch.zeros(2, 1, 32, device=device))
    hook = block.mlp.register_forward_hook(lambda *args: None)
    assert "hooks" in reason()
    hook.remove()
    monkeypatch.setattr(products, "ENABLED", False)
    assert "switched off" in reason()
