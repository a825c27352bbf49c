"""Linear twins are the modules of other libraries with the same weights."""

import importlib

import pytest
import torch
import transformers

from loglinear.layers import LogLinearKDA, LogLinearRetention
from loglinear.layers.retention import lightning_factor
from loglinear.models import LogLinearForCausalLM


def module_of(family, name, config, **fields):
    """A tiny module of transformers with random weights, in float32."""
    if not hasattr(transformers, config):
        pytest.skip(f"transformers {transformers.__version__} has no {config}")
    kind = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    made = kind(getattr(transformers, config)(hidden_size=32, num_hidden_layers=4, **fields), 2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made, torch.randn(2, 150, 32, generator=generator)


def close(ours, theirs):
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@torch.no_grad()
def test_kda_is_that_of_kimi_linear():
    """Measured: 9e-7. Their queries are multiplied by K^-1/2, so the eps of our norm is K times as large."""
    theirs, hidden = module_of(
        *("kimi_linear", "KimiLinearDeltaAttention", "KimiLinearConfig"),
        **{"linear_num_heads": 4, "linear_head_dim": 8, "layer_types": ["linear_attention"] * 4},
    )
    ours = LogLinearKDA(32, 4, 8, 8, norm_eps=8 * theirs.o_norm.variance_epsilon, log_linear=False)
    gate = theirs.forget_gate
    rows = (theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.g_a_proj, gate.f_a_proj, theirs.b_proj)
    weights = {
        "in_proj.weight": torch.cat([layer.weight for layer in rows]),
        "gate_proj.weight": theirs.g_b_proj.weight,
        "decay_proj.weight": gate.f_b_proj.weight,
        "conv.weight": theirs.conv1d.weight.squeeze(1),
        "dt_bias": gate.dt_bias,
        "A_log": gate.A_log.flatten(),
        "norm.weight": theirs.o_norm.weight,
        "out_proj.weight": theirs.o_proj.weight,
    }
    ours.load_state_dict(weights)
    close(ours(hidden)[0], theirs(hidden))


@torch.no_grad()
def test_lightning_is_that_of_minimax():
    """Measured: 2e-7. Theirs is the third of four layers, and its rows stand head by head."""
    theirs, hidden = module_of(
        *("minimax", "MiniMaxLightningAttention", "MiniMaxConfig"),
        **{"num_attention_heads": 4, "head_dim": 8, "block_size": 16, "layer_types": ["linear_attention"] * 4},
    )
    ours = LogLinearRetention(
        *(32, 4, 8, 8),
        **{"log_linear": False, "conv_activation": "silu", "gate_activation": "sigmoid", "norm_per_head": False},
        **{"decays": "slopes", "decay_factor": lightning_factor(2, 4), "rotary_base": None},
    )
    qkv = theirs.qkv_proj.weight.view(4, 3, 8, 32).transpose(0, 1).flatten(0, 2)
    weights = {
        "in_proj.weight": torch.cat([qkv, theirs.output_gate.weight]),
        "norm.weight": theirs.norm.weight,
        "out_proj.weight": theirs.out_proj.weight,
    }
    ours.load_state_dict(weights)
    close(ours(hidden)[0], theirs(hidden, None, None)[0])


FLA = {
    "retnet": ("RetNetConfig", "RetNetForCausalLM", {"num_heads": 2}),
    "gla": ("GLAConfig", "GLAForCausalLM", {"num_heads": 2, "expand_k": 1.0}),
    "gla, key heads": ("GLAConfig", "GLAForCausalLM", {"num_heads": 2, "num_kv_heads": 1, "use_short_conv": True}),
    "kda": ("KDAConfig", "KDAForCausalLM", {"num_heads": 2, "head_dim": 64}),
    "kda, bound": (
        "KDAConfig",
        "KDAForCausalLM",
        {"num_heads": 2, "num_v_heads": 4, "head_dim": 64, "safe_gate": True, "lower_bound": -5.0},
    ),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FLA)
@torch.no_grad()
def test_models_are_those_of_flash_linear_attention(name, tmp_path):
    """Its own kernels on a GPU, in bfloat16: at most twice the error of our layers in bfloat16, both against float64."""
    config, model, fields = FLA[name]
    models = pytest.importorskip(f"fla.models.{name.split(',')[0]}", exc_type=ImportError)
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 128}
    theirs = getattr(models, model)(getattr(models, config)(**sizes, **fields)).eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(61, (2, 200))
    exact = LogLinearForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)(ids).logits
    ours = LogLinearForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).cuda()(ids.cuda()).logits
    theirs = theirs.to("cuda", torch.bfloat16)(ids.cuda(), use_cache=False).logits
    mistakes = [float((x.double().cpu() - exact).norm() / exact.norm()) for x in (ours, theirs)]
    assert mistakes[1] < max(2 * mistakes[0], 0.02), f"another convention? ours and theirs are {mistakes} from float64"
    assert mistakes[0] < max(2 * mistakes[1], 0.02)
