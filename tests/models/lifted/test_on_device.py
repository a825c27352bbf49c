"""Lifted Mamba-2 models on a GPU: kernels where they know every field, plain PyTorch where they do not, one result."""

import copy

import pytest
import torch
from transformers import DynamicCache

import loglinear
from loglinear.models.lifted.cache import states_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*runs in plain PyTorch on the GPU"),
]

WIDE = {
    "mamba2, one group": {"num_heads": 4, "head_dim": 32, "state_size": 32, "n_groups": 1, "hidden_size": 64},
    "mamba2": {"num_heads": 4, "head_dim": 32, "state_size": 32, "n_groups": 4, "hidden_size": 64},
    "nemotron": {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 32, "time_step_min": 0.2},
    "falcon": {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 32, "mamba_d_ssm": 128},
}


@pytest.fixture(params=WIDE)
def lifted(request, make_family):
    """A lifted model with widths that every kernel takes, and λ that differ."""
    model = make_family(request.param.split(",")[0], **WIDE[request.param])
    loglinear.lift(model)
    for module in model.modules():
        if isinstance(module, loglinear.layers.LevelScale):
            torch.nn.init.normal_(module.dl_proj.weight, std=0.1)
    return model


def difference(one, other):
    return float((one.double().cpu() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_logits_and_gradients(lifted, ids, dtype, tolerance):
    """Against the same model in float64 on the CPU. float32 products may be TF32 inside attention layers."""
    tokens = ids(2, 200)
    exact, device = copy.deepcopy(lifted).double(), lifted.to("cuda", dtype)
    grads = {}
    for name, model, where in (("cpu", exact, "cpu"), ("cuda", device, "cuda")):
        out = model(tokens.to(where), use_cache=False).logits
        out.double().square().mean().backward()
        grads[name] = out, {key: x.grad for key, x in model.named_parameters() if x.grad is not None}
    assert difference(grads["cuda"][0].detach(), grads["cpu"][0].detach()) < tolerance
    for key, want in grads["cpu"][1].items():
        assert difference(grads["cuda"][1][key], want) < 10 * tolerance, key


@torch.no_grad()
def test_tokens_one_by_one(lifted, ids, cache_name):
    tokens = ids(2, 150)
    want = copy.deepcopy(lifted).double()(tokens, use_cache=False).logits
    lifted.cuda()
    tokens, cache, out = tokens.cuda(), DynamicCache(config=lifted.config), []
    name = cache_name(lifted)
    for part in (tokens[:, :100], *tokens[:, 100:].split(1, dim=1)):
        out.append(lifted(part, use_cache=True, **{name: cache}).logits)
    assert states_of(cache, 0).length == 150
    assert difference(torch.cat(out, 1), want) < 1e-3
