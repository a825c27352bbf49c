"""A lifted model of transformers in a folder: saved and loaded by transformers' own calls, equal to the bit."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import loglinear
from loglinear.models.levels import level_parameters

FAMILIES = [
    "mamba2",
    "bamba",
    "granite",
    "nemotron",
    "zamba2",
    "falcon",
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_moe",
    "olmo_hybrid",
]


@pytest.fixture
def lifted(make_family):
    """``lifted(family)``: a lifted model whose λ differ from token to token, as after training."""

    def make(family):
        model = make_family(family)
        loglinear.lift(model, num_levels=5)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in level_parameters(model).values():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        return model

    return make


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_loaded_and_put_on_again_it_is_the_same_model(family, lifted, make_family, ids, tmp_path):
    model, tokens = lifted(family), ids(2, 40)
    want, base = logits(model, tokens), make_family(family)
    assert (want - logits(base, tokens)).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "model")
    loglinear.save_levels(model, tmp_path / "levels")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded, tokens), want)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    loglinear.load_levels(base, tmp_path / "levels")
    assert torch.equal(logits(base, tokens), want)


def test_every_way_to_save_and_to_load(lifted, ids, tmp_path):
    """By the class of the model, on a device of one's choice, in several files, and a second time; then it generates."""
    model, tokens = lifted("zamba2"), ids(2, 50)
    want = logits(model, tokens)
    model.save_pretrained(tmp_path / "once")
    config = json.loads((tmp_path / "once" / "config.json").read_text())
    assert config["loglinear_levels"] == {"num_levels": 5}
    assert config["quantization_config"] == {"quant_method": "loglinear_levels"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    assert not loaded.is_quantized
    loaded.save_pretrained(tmp_path / "twice", max_shard_size="20KB")
    assert len(list((tmp_path / "twice").glob("*.safetensors"))) > 1
    for options in ({}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}):
        again = type(model).from_pretrained(tmp_path / "twice", **options)
        assert torch.equal(logits(again, tokens), want)
    assert again.config.loglinear_levels == {"num_levels": 5}
    prompt = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(tokens[:, :21], **prompt), model.generate(tokens[:, :21], **prompt))


def test_bfloat16(lifted, ids, tmp_path):
    """Asked for while loading, and of a model that was saved in it."""
    model, tokens = lifted("mamba2"), ids(2, 50)
    exact = logits(model, tokens)
    model.save_pretrained(tmp_path / "wide")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    want = logits(model, tokens)
    assert (want.float() - exact).norm() < 0.1 * exact.norm()  # measured: 0.04
    for folder, options in (("wide", {"dtype": torch.bfloat16}), ("narrow", {})):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder, **options)
        assert {x.dtype for x in loaded.parameters()} == {torch.bfloat16}
        assert torch.equal(logits(loaded, tokens), want)


def test_without_this_package_transformers_lists_the_levels(lifted, ids, make_family, tmp_path, monkeypatch):
    """As unexpected weights; its model is the base, and it says that it skips a method."""
    tokens = ids(1, 30)
    lifted("mamba2").save_pretrained(tmp_path)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "loglinear_levels")
    said = []
    monkeypatch.setattr(transformers.quantizers.auto.logger, "warning", said.append)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(said) == 1
    assert "loglinear_levels" in said[0]
    assert len(info["unexpected_keys"]) == 2 * plain.config.num_hidden_layers
    assert all(".level_scale." in name for name in info["unexpected_keys"])
    assert torch.equal(logits(plain, tokens), logits(make_family("mamba2"), tokens))


def test_a_folder_without_its_levels_is_refused(lifted, tmp_path):
    lifted("mamba2").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {name: x for name, x in tensors.items() if "layers.1.mixer.level_scale" not in name}, path, {"format": "pt"}
    )
    with pytest.raises(
        ValueError, match="must hold the levels of its lifted model, 4 tensors called level_scale: got 2"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["loglinear_levels"]["num_levels"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json must have loglinear_levels with num_levels.*got \{\}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_levels_alone_come_back_on_the_base(make_family, lifted, ids, tmp_path):
    make_family("bamba").save_pretrained(tmp_path / "base")
    lifted("mamba2").save_pretrained(tmp_path / "other")
    model, tokens = lifted("bamba"), ids(2, 50)
    loglinear.save_levels(model, tmp_path / "levels")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    report = loglinear.load_levels(fresh, tmp_path / "levels", train="levels")
    assert report.num_levels == 5
    assert torch.equal(logits(fresh, tokens), logits(model, tokens))
    assert {name for name, x in fresh.named_parameters() if x.requires_grad} == level_parameters(fresh).keys()
    with pytest.raises(ValueError, match=r"levels for a model of type 'mamba2': .* has 'bamba'"):
        loglinear.load_levels(AutoModelForCausalLM.from_pretrained(tmp_path / "other"), tmp_path / "levels")
    other = make_family("bamba", num_hidden_layers=3)
    with pytest.raises(
        ValueError, match=r"is of another base: 2 missing in the file \(model.layers.2.mamba.level_scale"
    ):
        loglinear.load_levels(other, tmp_path / "levels")
