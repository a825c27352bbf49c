"""Checkpoints: safetensors there and back, the Auto classes, and a linear checkpoint as the start of a log-linear model."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from loglinear.models import LogLinearConfig, LogLinearForCausalLM, LogLinearModel


def state_dicts_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@torch.no_grad()
def test_round_trip_through_safetensors(make_model, tokens, mixer, tmp_path):
    model, ids = make_model(mixer), tokens(2, 70)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    loaded = LogLinearForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert state_dicts_equal(model, loaded)
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert loaded.config.mixer == mixer


def test_auto_classes(make_model, tokens, tmp_path):
    model, ids = make_model("log_linear_mamba2"), tokens(1, 20)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LogLinearConfig
    causal = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert type(causal) is LogLinearForCausalLM
    assert torch.equal(causal(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert type(base) is LogLinearModel
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert type(AutoModelForCausalLM.from_config(model.config)) is LogLinearForCausalLM


def test_tied_embeddings(make_model, tokens, tmp_path):
    model, ids = make_model("gated_deltanet", tie_word_embeddings=True), tokens(1, 20)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = LogLinearForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("linear", ["mamba2", "gated_deltanet"])
def test_a_linear_checkpoint_starts_a_log_linear_model(make_model, linear, tmp_path):
    """Only λ is missing, and it is initialised as in a new model; nothing that was loaded is touched."""
    model = make_model(linear)
    model.save_pretrained(tmp_path)
    config = copy.deepcopy(model.config)
    config.mixer = f"log_linear_{linear}"
    loaded, info = LogLinearForCausalLM.from_pretrained(
        tmp_path, config=config, dtype=torch.float64, output_loading_info=True
    )
    assert {key.split("mixer.")[1] for key in info["missing_keys"]} == {"level_scale.L", "level_scale.dl_proj.weight"}
    assert not info["unexpected_keys"]
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    scale = loaded.model.layers[0].mixer.level_scale
    assert torch.equal(scale.L, torch.ones_like(scale.L))
    assert scale.dl_proj.weight.std().item() == pytest.approx(config.initializer_range, rel=0.2)


def test_a_parameter_missing_beside_loaded_ones(make_model, tmp_path):
    """An older Mamba-2 without a skip: D starts at 1 and its neighbours keep what the checkpoint says."""
    model = make_model("mamba2")
    weights = {key: value for key, value in model.state_dict().items() if not key.endswith(".D")}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded = LogLinearForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for old, new in zip(model.model.layers, loaded.model.layers):
        assert torch.equal(new.mixer.A_log, old.mixer.A_log)
        assert torch.equal(new.mixer.dt_bias, old.mixer.dt_bias)
        assert torch.equal(new.mixer.D, torch.ones(4, dtype=torch.float64))


def test_initialisation_survives_the_loader(config_of):
    """transformers initialises models its own way after ours: dt_bias, A_log and D must keep their meaning."""
    torch.manual_seed(0)
    model = LogLinearForCausalLM(config_of("log_linear_mamba2", mamba_head_dim=1, mamba_num_heads=400, hidden_size=64))
    mixer = model.model.layers[0].mixer
    step = torch.nn.functional.softplus(mixer.dt_bias)
    assert 9e-4 < step.min() < 2e-3
    assert 5e-2 < step.max() < 0.101
    assert 1 <= mixer.A_log.exp().min() < 2 < 15 < mixer.A_log.exp().max() < 16.01
    assert torch.equal(mixer.D, torch.ones(400))
    assert mixer.conv.weight.abs().max().item() == pytest.approx(0.5, rel=0.01)
    assert mixer.conv.bias.abs().max() == 0
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.3, rel=0.05)


def test_no_weight_decay_names_and_flags_after_loading(make_model, tmp_path):
    make_model(["log_linear_mamba2", "attention", "gated_deltanet"]).save_pretrained(tmp_path)
    model = LogLinearForCausalLM.from_pretrained(tmp_path)
    want = {f"model.layers.0.mixer.{name}" for name in ("A_log", "dt_bias", "D", "level_scale.L")}
    want |= {f"model.layers.2.mixer.{name}" for name in ("A_log", "dt_bias")}
    assert model.no_weight_decay() == want
    assert {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)} == want


@torch.no_grad()
def test_bfloat16_weights(make_model, tokens, mixer, tmp_path):
    """Computing in bfloat16 costs no more than a few times what rounding the weights to it costs, with a cache or without."""
    model, ids = make_model(mixer, initializer_range=0.1), tokens(2, 100)
    model.save_pretrained(tmp_path)
    low = LogLinearForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    rounded = copy.deepcopy(low).double()
    want = model(ids).logits
    limit = 3 * (rounded(ids).logits - want).norm()
    out = low(ids).logits
    assert out.dtype == torch.bfloat16
    assert (out - want).norm() < limit
    cache = low(ids[:, :70]).past_key_values
    pieces = [out[:, :70], low(ids[:, 70:], past_key_values=cache).logits]
    assert (torch.cat(pieces, dim=1) - want).norm() < limit
