"""The paper's layouts: logits of the definition, every tensor used, and errors that list what does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig

from loglinear.models import LogLinearConfig, LogLinearForCausalLM, LogLinearModel


def relative_error(model, folder) -> float:
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    return ((logits.double() - expected["logits"]).norm() / expected["logits"].norm()).item()


def test_logits_are_those_of_the_definition(published):
    """Measured: 8e-7 in float32; 3e-8 in float64, the rounding of the expected logits."""
    model, info = LogLinearForCausalLM.from_pretrained(published, output_loading_info=True)
    assert model.dtype == torch.float32
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert relative_error(model, published) < 1e-5
    assert relative_error(LogLinearForCausalLM.from_pretrained(published, dtype=torch.float64), published) < 1e-7


def test_every_number_of_the_file_is_in_the_model(published):
    theirs = load_file(published / "model.safetensors")
    model = LogLinearForCausalLM.from_pretrained(published)
    assert model.num_parameters() == sum(x.numel() for x in theirs.values())
    sums = [sum(x.double().sum() for x in tensors.values()) for tensors in (theirs, model.state_dict())]
    assert sums[0].item() == pytest.approx(sums[1].item(), abs=1e-9)


def test_the_auto_classes_open_it(published):
    assert type(AutoConfig.from_pretrained(published)) is LogLinearConfig
    model = AutoModelForCausalLM.from_pretrained(published)
    assert type(model) is LogLinearForCausalLM
    assert relative_error(model, published) < 1e-5
    assert type(AutoModel.from_pretrained(published)) is LogLinearModel
    named = LogLinearForCausalLM.from_pretrained(pretrained_model_name_or_path=published, device_map="cpu")
    assert relative_error(named, published) < 1e-5
    below = AutoModelForCausalLM.from_pretrained(published.parent, subfolder=published.name)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), below.parameters(), strict=True))


def test_sharded_and_generation_settings(published, tmp_path):
    """Files as a hub snapshot has them: shards, an index, and settings of generation."""
    tensors = load_file(published / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_bytes((published / "config.json").read_bytes())
    GenerationConfig(max_new_tokens=7, eos_token_id=5).save_pretrained(tmp_path)
    model = LogLinearForCausalLM.from_pretrained(tmp_path)
    assert relative_error(model, published) < 1e-5
    assert model.generation_config.max_new_tokens == 7
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00002\.safetensors"):
        LogLinearForCausalLM.from_pretrained(tmp_path)


def test_missing_and_surplus_tensors_are_listed(published, copy_of):
    def change(tensors):
        name = next(name for name in tensors if name.endswith("1.mlp.up_proj.weight"))
        return {f"{name}.old": tensors.pop(name), **tensors}

    up = r"(model|backbone)\.layers\.1\.mlp\.up_proj\.weight"
    with pytest.raises(ValueError, match=rf"1 missing: {up}; 1 surplus: {up}\.old$"):
        LogLinearForCausalLM.from_pretrained(copy_of(published, tensors=change))


def test_a_tensor_of_another_shape_is_named(published, copy_of):
    """Twelve levels in place of fifteen."""

    def change(tensors):
        name = next(name for name in tensors if name.endswith("0.attn.L") or name.endswith("0.mixer.L"))
        return tensors | {name: tensors[name][:, :12].contiguous()}

    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.level_scale\.L \[2, 15\] from .*\.L \[2, 12\]"):
        LogLinearForCausalLM.from_pretrained(copy_of(published, tensors=change))


def test_rows_that_nothing_takes_are_an_error(copy_of, published):
    """One row more than the layout has, in a tensor that is cut or joined."""

    def change(tensors):
        name = next(name for name in tensors if name.endswith(("0.attn.q_proj.weight", "0.mixer.in_proj.weight")))
        return tensors | {name: torch.cat([tensors[name], tensors[name][:1]])}

    with pytest.raises(ValueError, match="holds tensors of other shapes than its config"):
        LogLinearForCausalLM.from_pretrained(copy_of(published, tensors=change))


def test_tied_embeddings(published, copy_of):
    """A copy in ``lm_head.weight`` may be there. Another matrix may not."""
    tied = copy_of(published, config={"tie_word_embeddings": True})
    with pytest.raises(ValueError, match=r"one matrix as lm_head\.weight and embeddings"):
        LogLinearForCausalLM.from_pretrained(tied)
    tensors = load_file(tied / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    (embeddings,) = [name for name in tensors if name.endswith("embeddings.weight")]
    for change in ({}, {"lm_head.weight": tensors[embeddings].clone()}):
        save_file(tensors | change, tied / "model.safetensors")
        model = LogLinearForCausalLM.from_pretrained(tied)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, head)


def test_weights_without_a_config(published, copy_of):
    """The config comes from the caller: such weights are ours, as ever."""
    model = LogLinearForCausalLM.from_pretrained(published)
    folder = copy_of(published)
    model.save_pretrained(folder)
    (folder / "config.json").unlink()
    again = LogLinearForCausalLM.from_pretrained(folder, config=model.config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_options_that_our_models_lack_are_named(published, copy_of):
    with pytest.raises(ValueError, match=r"must hold hidden_act='silu' or 'swish', .*: got 'gelu'"):
        LogLinearForCausalLM.from_pretrained(copy_of(published, config={"hidden_act": "gelu"}))


def test_unknown_options_are_a_warning(published, copy_of):
    odd = copy_of(published, config={"window_of_wonder": 3})
    with pytest.warns(UserWarning, match="options that loglinear does not know: window_of_wonder"):
        model = LogLinearForCausalLM.from_pretrained(odd)
    assert relative_error(model, published) < 1e-5


def test_a_size_that_is_not_told(published, copy_of):
    config = json.loads((published / "config.json").read_text())
    del config["vocab_size"]
    with pytest.raises(ValueError, match=r"config\.json \(model_type .*\) must hold vocab_size: got none"):
        LogLinearConfig.from_dict(config)
    clash = {"norm_eps": 1e-5, "layer_norm_epsilon": 1e-6}
    with pytest.raises(ValueError, match="must hold one value for norm_eps and layer_norm_epsilon"):
        LogLinearForCausalLM.from_pretrained(copy_of(published, config=clash))


def test_it_trains_and_generates_like_a_model_of_ours(published, tmp_path):
    """Saved, it is a checkpoint of ours, and the original is as it was."""
    before = (published / "model.safetensors").read_bytes()
    model = LogLinearForCausalLM.from_pretrained(published)
    ids = load_file(published / "expected.safetensors")["input_ids"]
    model.train()
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval().save_pretrained(tmp_path)
    again = LogLinearForCausalLM.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "loglinear"
    assert torch.equal(again(ids).logits, model(ids).logits)
    text = again.generate(ids[:, :40], max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        assert torch.equal(text[:, -1], again(text[:, :-1]).logits[:, -1].argmax(-1))
    assert (published / "model.safetensors").read_bytes() == before
