"""Checkpoints of flash-linear-attention: logits of the definitions of its models, and what a lift makes of them."""

import json

import definitions
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

import loglinear
from loglinear.models import LogLinearForCausalLM, convert

pytestmark = pytest.mark.default_packages

CASES = {
    "mamba2": {},
    "mamba2 groups, biases, norm first": {
        "n_groups": 2,
        "norm_before_gate": True,
        "D_has_hdim": True,
        "use_bias": True,
        "use_conv_bias": False,
        "dt_limit": [0.5, 0.9],
    },
    "mamba2 no norm": {"rmsnorm": False, "tie_word_embeddings": True},
    "log_linear_mamba2": {},
    "log_linear_mamba2 groups, biases, norm first": {
        "n_groups": 2,
        "norm_before_gate": True,
        "D_has_hdim": True,
        "use_bias": True,
        "use_conv_bias": False,
    },
    "gated_deltanet": {},
    "gated_deltanet value heads, sigmoid": {
        "num_v_heads": 4,
        "allow_neg_eigval": True,
        "output_gate_activation": "sigmoid",
        "tie_word_embeddings": True,
    },
    "gated_deltanet no gate, no convolution": {"use_gate": False, "use_short_conv": False},
    "gated_deltanet hybrid": {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "rope_theta": 500.0}},
    "delta_net": {},
    "delta_net gate, sum of elu": {"use_gate": True, "use_beta": False, "qk_activation": "elu", "qk_norm": "sum"},
    "delta_net relu, beta times two": {"qk_activation": "relu", "allow_neg_eigval": True, "use_short_conv": False},
    "kda": {},
    "kda value heads, bound, beta times two": {
        "num_v_heads": 4,
        "safe_gate": True,
        "lower_bound": -5.0,
        "allow_neg_eigval": True,
        "use_short_conv": False,
    },
    "kda hybrid": {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2}},
    "gla": {},
    "gla key heads, convolution, a least decay": {"num_kv_heads": 2, "use_short_conv": True, "clamp_min": -0.05},
    "gla no gate, relu": {"use_output_gate": False, "feature_map": "relu"},
    "retnet": {},
    "retnet key heads, a norm of its own": {"num_kv_heads": 2, "fuse_norm": False, "tie_word_embeddings": True},
}


def options(case):
    kind = case.split(" ")[0]
    return {"model_type": kind} | definitions.DEFAULTS[kind] | CASES[case]


@pytest.fixture
def checkpoint(request, tmp_path):
    """``(folder, config, weights)`` of a case."""
    config = options(request.param)
    weights = definitions.weights_of(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path, config, weights


@pytest.mark.parametrize("checkpoint", CASES, indirect=True)
@torch.no_grad()
def test_logits_are_those_of_the_definition(checkpoint):
    """In float64, and in float32 to 1e-5 relative. Every number of the file is a parameter."""
    folder, config, weights = checkpoint
    ids = torch.randint(definitions.VOCAB, (13,), generator=torch.Generator().manual_seed(1))
    want = definitions.logits(config, weights, ids)
    model = LogLinearForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert model.num_parameters() == sum(x.numel() for x in weights.values())
    rotary = "attn" in config or config["model_type"] == "retnet"  # its angles are float32 here; measured: 2e-6
    limit = 1e-5 if rotary else 1e-10
    torch.testing.assert_close(model(ids[None]).logits[0], want, rtol=0, atol=limit)
    low = LogLinearForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids[None]).logits[0]
    assert (low - want).norm() < 1e-5 * want.norm()


LINEAR = [case for case in CASES if not case.startswith("log_linear")]


@pytest.mark.parametrize("checkpoint", LINEAR, indirect=True)
@torch.no_grad()
def test_lifted_it_says_the_same(checkpoint, tmp_path):
    """Written as ours, lifted, saved and loaded."""
    folder, _, _ = checkpoint
    convert(folder, tmp_path / "ours")
    model = LogLinearForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    ids = torch.randint(definitions.VOCAB, (2, 70), generator=torch.Generator().manual_seed(1))
    want, text = model(ids).logits, model.generate(ids[:, :9], max_new_tokens=6, do_sample=False)
    loglinear.lift(model)
    model.save_pretrained(tmp_path / "lifted")
    again = LogLinearForCausalLM.from_pretrained(tmp_path / "lifted", dtype=torch.float64)
    for lifted in (model, again):
        torch.testing.assert_close(lifted(ids).logits, want, rtol=0, atol=1e-10)
        assert torch.equal(lifted.generate(ids[:, :9], max_new_tokens=6, do_sample=False), text)


@pytest.mark.parametrize("checkpoint", ["gated_deltanet", "delta_net"], indirect=True)
def test_the_auto_classes_open_it(checkpoint):
    assert type(AutoModelForCausalLM.from_pretrained(checkpoint[0])) is LogLinearForCausalLM


@torch.no_grad()
def test_mamba2_of_transformers(tmp_path):
    """The same layout with other names of options. Its own forward is the definition here, in float32."""
    torch.manual_seed(0)

    def build(groups):
        sizes = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 4}
        return Mamba2ForCausalLM(Mamba2Config(**sizes, state_size=6, n_groups=groups)).eval()

    original = build(4)
    if not hasattr(original.backbone.layers[0].mixer.norm, "group_size"):
        original = build(1)  # early versions normalise all groups as one, unlike the models that they load
    for name, parameter in original.named_parameters():
        if name.endswith(("dt_bias", "A_log", "D", "norm.weight")):
            parameter.uniform_(0.5, 1)
    original.save_pretrained(tmp_path)
    ids = torch.randint(23, (2, 70))
    want = original(ids, use_cache=False).logits
    model = LogLinearForCausalLM.from_pretrained(tmp_path)
    assert (model(ids).logits - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("gated_deltanet", {"hidden_act": "powlu"}, "hidden_act='silu' or 'swish', .*: got 'powlu'"),
        ("delta_net", {"attnres_block_size": 2}, "attnres_block_size=None, .*: got 2"),
        ("gla", {"use_gv": True}, "use_gv=False, .*: got True"),
        ("retnet", {"elementwise_affine": False}, "elementwise_affine=True, .*: got False"),
        ("gla", {"feature_map": "sqrelu"}, "qk_activation must be one of .*: got 'sqrelu'"),
        ("delta_net", {"qk_norm": "max"}, "qk_norm must be 'l2' or 'sum': got 'max'"),
        ("mamba2", {"head_dim": 7}, "num_heads and head_dim whose product is expand · hidden_size, 32: got 4 and 7"),
        (
            "gated_deltanet hybrid",
            {"attn": {"layers": [1], "num_heads": 4, "window_size": 8}},
            "window_size=None, .* got 8",
        ),
        (
            "gated_deltanet",
            {"attn": [{"layers": [0], "num_heads": 4}, {"layers": [1], "num_heads": 2}]},
            "one kind of attention in attn",
        ),
    ],
)
def test_options_that_our_models_lack_are_named(case, change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(options(case) | change))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        LogLinearForCausalLM.from_pretrained(tmp_path)
