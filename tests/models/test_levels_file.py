"""Levels alone: saved without the base, put on the base again, refused by any other, and trained by themselves."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loglinear
from loglinear.models import LogLinearForCausalLM
from loglinear.models.levels import level_parameters

pytestmark = pytest.mark.default_packages

HYBRID = ["mamba2", "attention", "gated_deltanet"]


@pytest.fixture
def base(make_model, tmp_path):
    """The folder of a linear model."""
    make_model(HYBRID).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder, **options):
    return LogLinearForCausalLM.from_pretrained(folder, **({"dtype": torch.float64} | options)).eval()


def trained(model, ids, steps=2):
    """``model`` after some steps of the parameters that an optimizer may change."""
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def test_levels_come_back_on_a_fresh_base(base, tokens, tmp_path):
    """To the bit, over a save of the whole model too; and the file is the levels and their description."""
    ids, path = tokens(2, 70), tmp_path / "levels.safetensors"
    linear = load(base)
    before = logits(linear, ids)
    loglinear.lift(linear, num_levels=9, train="levels")
    lifted = trained(linear, ids)
    loglinear.save_levels(lifted, path)
    assert load_file(path).keys() == level_parameters(lifted).keys()
    metadata = metadata_of(path)
    assert metadata.pop("base_hash")
    assert metadata == {
        "format": "pt", "loglinear_levels": "1", "model_type": "loglinear", "num_levels": "9", "base": str(base),
    }  # fmt: skip

    again = load(base)
    report = loglinear.load_levels(again, path, train="levels")
    assert report.lifted == ["model.layers.0.mixer", "model.layers.2.mixer"]
    assert torch.equal(logits(again, ids), logits(lifted, ids))
    assert (logits(again, ids) - before).abs().max() > 1e-3
    assert {name for name, x in again.named_parameters() if x.requires_grad} == level_parameters(again).keys()

    again.save_pretrained(tmp_path / "whole")
    whole = load(tmp_path / "whole")
    assert whole.config.loglinear_levels == {"num_levels": 9, "base": str(base)}
    assert torch.equal(logits(whole, ids), logits(lifted, ids))
    loglinear.save_levels(whole, tmp_path / "second")  # still of the first base
    assert metadata_of(tmp_path / "second") == metadata_of(path)
    with torch.no_grad():
        for parameter in level_parameters(whole).values():
            parameter.zero_()
    assert loglinear.load_levels(whole, path).lifted == []  # it is lifted
    assert torch.equal(logits(whole, ids), logits(lifted, ids))


def test_a_base_in_another_dtype_is_the_same_base(base, tokens, tmp_path):
    ids = tokens(1, 40)
    lifted = load(base, dtype=torch.float32)
    loglinear.lift(lifted, train="levels")
    loglinear.save_levels(trained(lifted, ids), tmp_path / "levels")
    coarse = load(base, dtype=torch.bfloat16)
    loglinear.load_levels(coarse, tmp_path / "levels")
    assert {x.dtype for x in coarse.parameters()} == {torch.bfloat16}
    for name, parameter in level_parameters(coarse).items():
        assert torch.equal(parameter, level_parameters(lifted)[name].bfloat16())


def test_another_base_is_refused_and_stays_as_it_was(base, make_model, tokens, tmp_path):
    path = tmp_path / "levels"
    lifted = load(base)
    loglinear.lift(lifted)
    loglinear.save_levels(lifted, path)

    def refused(model, message, **options):
        before = {name: x.clone() for name, x in model.named_parameters()}
        with pytest.raises(ValueError, match=message):
            loglinear.load_levels(model, path, **options)
        assert all(torch.equal(before[name], x) for name, x in model.named_parameters())
        assert len(before) == len(list(model.parameters()))
        return model

    other = refused(make_model(HYBRID, seed=1), f"the levels were saved on {base}, and this is a model without a name")
    assert loglinear.load_levels(other, path, any_base=True).lifted  # of the same shapes
    refused(trained(load(base), tokens(1, 30)), f"this is {base}, with other weights")
    refused(trained(lifted, tokens(1, 30)), "with other weights")  # lifted, and trained with its levels
    deeper = make_model([*HYBRID, "mamba2"], num_hidden_layers=4)
    refused(deeper, r"another base: 2 missing in the file \(model.layers.3.mixer.level_scale.L, model", any_base=True)
    swapped = make_model(HYBRID[::-1], delta_num_heads=6)
    refused(swapped, r"another base: 2 of another shape \(model.layers.0.mixer.level_scale.\w", any_base=True)
    shallow = make_model(["mamba2", "attention", "attention"])
    refused(shallow, r"another base: 2 not in the model \(model.layers.2", any_base=True)
    other = make_model(HYBRID)
    other.config.model_type = "mamba2"
    refused(other, "must hold levels for a model of type 'mamba2': .* has 'loglinear'", any_base=True)


def test_a_file_of_another_kind_is_named(base, tmp_path):
    path = tmp_path / "file"
    for metadata, found in ((None, "none"), ({"loglinear_levels": "2"}, "version 2")):
        save_file({"x": torch.zeros(2)}, path, metadata)
        with pytest.raises(ValueError, match=f"path must be a file of save_levels in version 1 .* is of {found}"):
            loglinear.load_levels(load(base), path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"path must be a file of save_levels: .* cannot be read"):
        loglinear.load_levels(load(base), path)


def test_only_levels_of_a_lift_are_saved(make_model, tmp_path):
    with pytest.raises(ValueError, match="model must have been lifted: got one without log-linear layers"):
        loglinear.save_levels(make_model("mamba2"), tmp_path / "file")
    with pytest.raises(ValueError, match=r"must have λ that start at 1.*model.layers.0.mixer.level_scale does not"):
        loglinear.save_levels(make_model("log_linear_mamba2"), tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_training_the_levels_alone(make_model, tokens):
    """One argument freezes the rest; "all" changes no parameter's fate."""
    model, ids = make_model(HYBRID), tokens(2, 50)
    loglinear.lift(model, train="levels")
    before = {name: x.clone() for name, x in model.named_parameters()}
    trained(model, ids)
    changed = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert changed == level_parameters(model).keys()

    model = make_model(HYBRID)
    model.model.embed_tokens.requires_grad_(False)
    loglinear.lift(model)
    assert [name for name, x in model.named_parameters() if not x.requires_grad] == ["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"train must be one of \['all', 'levels'\]: got 'some'"):
        loglinear.lift(make_model("mamba2"), train="some")
