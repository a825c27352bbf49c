"""LogLinearConfig: derived widths, layer types, and errors that say what is needed."""

import json

import pytest
import torch

from loglinear.models import LogLinearConfig, LogLinearForCausalLM


def test_widths_follow_the_hidden_size():
    config = LogLinearConfig(hidden_size=256, num_hidden_layers=2)
    assert config.intermediate_size == 704  # 8/3 · 256 = 682.7, up to a multiple of 64
    assert config.mamba_num_heads == 8
    assert (config.delta_num_heads, config.delta_num_key_heads) == (6, 6)
    assert (config.delta_key_dim, config.delta_value_dim) == (32, 64)
    assert (config.kda_num_heads, config.kda_num_key_heads, config.kda_key_dim, config.kda_value_dim) == (
        2,
        2,
        128,
        128,
    )
    assert (config.kda_decay_rank, config.kda_gate_rank) == (128, 128)
    assert (config.gla_num_heads, config.gla_num_kv_heads, config.gla_key_dim, config.gla_value_dim) == (4, 4, 32, 64)
    assert (config.retnet_num_kv_heads, config.retnet_key_dim, config.retnet_value_dim) == (8, 32, 64)
    assert (config.lightning_num_heads, config.lightning_head_dim) == (2, 128)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 4, 64)
    assert LogLinearConfig(hidden_size=256, mamba_num_heads=5).mamba_num_heads == 5


def test_levels_follow_the_context():
    assert LogLinearConfig(max_position_embeddings=16_384).num_levels == 15
    assert LogLinearConfig(max_position_embeddings=16_385).num_levels == 16
    assert LogLinearConfig(max_position_embeddings=1).num_levels == 1


def test_a_saved_config_is_complete_and_comes_back(tmp_path):
    config = LogLinearConfig(mixer=["attention", "mamba2"], num_hidden_layers=2, hidden_size=128)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["mixer"] == ["attention", "mamba2"]
    assert saved["mamba_num_heads"] == 4
    assert LogLinearConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert config.layer_types == ["loglinear_attention", "loglinear_recurrent"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixer": "mamba"}, "mixer must be one of .* or a list of them: got 'mamba'"),
        ({"mixer": 3}, "mixer must be one of .* or a list of them: got 3"),
        ({"mixer": ["mamba2", "attn"]}, r"got \['mamba2', 'attn'\]"),
        ({"mixer": ["mamba2"]}, r"mixer must name 21 layers \(num_hidden_layers\): got 1 names"),
        ({"hidden_size": 0}, "hidden_size must be at least 1: got 0"),
        ({"mamba_head_dim": 0}, "mamba_head_dim must be at least 1: got 0"),
        ({"delta_num_heads": 0}, "delta_num_heads must be at least 1: got 0"),
        ({"intermediate_size": -1}, "intermediate_size must be at least 0: got -1"),
        ({"mamba_num_groups": 5}, "mamba_num_heads must be a multiple of mamba_num_groups=5: got 48"),
        ({"delta_num_key_heads": 4}, "delta_num_heads must be a multiple of delta_num_key_heads=4: got 6"),
        ({"num_key_value_heads": 7}, "num_attention_heads must be a multiple of num_key_value_heads=7: got 24"),
        ({"kda_num_key_heads": 5}, "kda_num_heads must be a multiple of kda_num_key_heads=5: got 12"),
        ({"kda_decay_rank": -1}, "kda_decay_rank must be at least 0: got -1"),
        (
            {"mixer": "retnet", "retnet_key_dim": 5},
            r"retnet_key_dim must be even \(rotary positions turn pairs\): got 5",
        ),
        ({"decoding_entry_dtype": "float16"}, "decoding_entry_dtype must be 'float32' or 'bfloat16': got 'float16'"),
        ({"mixer": "attention", "head_dim": 5}, r"head_dim must be even \(rotary positions turn pairs\): got 5"),
    ],
)
def test_errors_name_field_value_and_need(fields, message):
    with pytest.raises(ValueError, match=message):
        LogLinearConfig(**fields)


def test_types_are_checked():
    with pytest.raises(TypeError, match="hidden_size must be an integer: got '256'"):
        LogLinearConfig(hidden_size="256")
    with pytest.raises(TypeError, match=r"mamba_num_heads must be an integer: got 2\.5"):
        LogLinearConfig(mamba_num_heads=2.5)


def test_a_config_is_checked_again_before_it_is_saved(tmp_path):
    config = LogLinearConfig(hidden_size=128)
    config.mixer = "mamba3"
    with pytest.raises(ValueError, match="mixer must be one of"):
        config.save_pretrained(tmp_path)


def test_mlps_can_be_left_out(make_model):
    model = make_model("mamba2", intermediate_size=0)
    assert not any("mlp" in name for name, _ in model.named_parameters())


def test_the_projection_of_level_scales_has_a_deviation_of_its_own(make_model):
    scale = make_model("log_linear_mamba2", level_scale_std=0.006, initializer_range=0.5).model.layers[0].mixer
    assert 0.004 < float(scale.level_scale.dl_proj.weight.detach().std()) < 0.008
    assert float(scale.in_proj.weight.detach().std()) > 0.3
    with pytest.raises(ValueError, match="level_scale_std must be None or at least 0: got -1"):
        LogLinearConfig(level_scale_std=-1)


def test_where_level_scales_start_is_saved(make_model, tokens, tmp_path):
    """A checkpoint of before the choice starts as the paper; "one" with a projection of zeros is the linear model."""
    model = make_model("log_linear_mamba2", level_scale_start="one")
    model.save_pretrained(tmp_path)
    config = LogLinearConfig.from_pretrained(tmp_path)
    assert config.level_scale_start == "one"
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["level_scale_start"]
    assert LogLinearConfig.from_dict(saved).level_scale_start == "paper"
    with pytest.raises(ValueError, match=r"level_scale_start must be one of \['paper', 'one'\]: got 'linear'"):
        LogLinearConfig(level_scale_start="linear")
    linear = make_model("mamba2")
    linear.load_state_dict(model.state_dict(), strict=False)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mixer.level_scale.dl_proj.weight)
    ids = tokens(2, 100)
    torch.testing.assert_close(model(ids).logits, linear(ids).logits, rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_pattern_of_kimi_linear(make_model, tokens):
    """KDA three times and attention once: a step after a prefill is the whole call."""
    for mixers in (["kda"] * 3 + ["attention"], ["log_linear_kda"] * 3 + ["attention"]):
        model, ids = make_model(mixers, num_hidden_layers=4), tokens(1, 30)
        assert model.config.layer_types == ["loglinear_recurrent"] * 3 + ["loglinear_attention"]
        cache = model(ids[:, :29]).past_key_values
        step = model(ids[:, 29:], past_key_values=cache).logits
        torch.testing.assert_close(step, model(ids).logits[:, 29:], rtol=0, atol=1e-9)


def test_decays_of_lightning_attention_follow_the_layer(make_model):
    """The first layer has the slopes of ALiBi, the last one nearly none, as in MiniMax's models."""
    layers = make_model("lightning", lightning_num_heads=4, num_hidden_layers=3).model.layers
    slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])
    for i, factor in enumerate((1 + 1e-5, 0.5 + 1.25e-5, 1.5e-5)):
        torch.testing.assert_close(layers[i].mixer.log_decay(torch.device("cpu")), -slopes * factor, rtol=1e-4, atol=0)


VARIANTS = {
    "mamba_use_bias": ("mamba2", True),
    "mamba_conv_bias": ("mamba2", False),
    "mamba_norm": ("mamba2", False),
    "mamba_norm_groups": ("mamba2", 2),
    "mamba_norm_before_gate": ("mamba2", True),
    "mamba_dt_limit": ("mamba2", [0.5, float("inf")]),
    "mamba_skip_per_channel": ("mamba2", True),
    "level_scale_bias": ("log_linear_mamba2", True),
    "delta_conv_bias": ("gated_deltanet", True),
    "delta_gate_activation": ("gated_deltanet", None),
    "delta_decay": ("gated_deltanet", False),
    "delta_use_beta": ("gated_deltanet", False),
    "delta_neg_eigval": ("gated_deltanet", True),
    "delta_qk_activation": ("gated_deltanet", "elu"),
    "delta_qk_norm": ("gated_deltanet", "sum"),
    "kda_conv_bias": ("kda", True),
    "kda_decay_rank": ("kda", 0),
    "kda_gate_rank": ("log_linear_kda", 3),
    "kda_gate_bias": ("kda", True),
    "kda_decay_bound": ("log_linear_kda", -5.0),
    "kda_neg_eigval": ("kda", True),
    "gla_conv_size": ("log_linear_gla", 3),
    "gla_qk_activation": ("gla", "relu"),
    "gla_gate_activation": ("gla", None),
    "gla_decay_rank": ("gla", 4),
    "gla_decay_normalizer": ("gla", 2.0),
    "gla_decay_min": ("log_linear_gla", -0.01),
    "retnet_conv_size": ("retnet", 3),
    "retnet_qk_activation": ("retnet", "relu"),
    "retnet_gate_activation": ("log_linear_retnet", "sigmoid"),
    "lightning_head_dim": ("log_linear_lightning", 5),
    "conv_size": ("gated_deltanet", 0),
    "mixer_norm_eps": ("mamba2", 1.0),
}


@pytest.mark.default_packages
@pytest.mark.parametrize("field", VARIANTS)
@torch.no_grad()
def test_variants_of_mixers_reach_the_model_and_are_saved(field, make_model, tokens, tmp_path):
    """Every field changes the logits or the tensors, a saved model has it again, and decoding goes on with it."""
    mixer, value = VARIANTS[field]
    model, plain, ids = make_model(mixer, **{field: value}), make_model(mixer), tokens(1, 30)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.1, 1)  # away from starts that hide a bias
    shapes = [{name: x.shape for name, x in m.state_dict().items()} for m in (model, plain)]
    logits = model(ids).logits
    if shapes[0] == shapes[1]:
        plain.load_state_dict(model.state_dict())
        assert (plain(ids).logits - logits).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = LogLinearForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert getattr(again.config, field) == value
    torch.testing.assert_close(again(ids).logits, logits, rtol=0, atol=1e-12)
    cache = again(ids[:, :20]).past_key_values
    pieces = [again(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 30)]
    torch.testing.assert_close(torch.cat(pieces, 1), logits[:, 20:], rtol=0, atol=1e-9)
