"""A lifted model is its linear model until it is trained, and a log-linear model in everything else."""

import pytest
import torch

import loglinear
from loglinear.models import LogLinearForCausalLM

pytestmark = pytest.mark.default_packages

LINEAR = ["mamba2", "gated_deltanet", ["mamba2", "attention", "gated_deltanet"], ["kda", "gla", "retnet"]]


@pytest.fixture(params=LINEAR, ids=["mamba2", "gated_deltanet", "hybrid", "others"])
def linear(request, make_model):
    return make_model(request.param)


@torch.no_grad()
def test_logits_and_generation_are_those_of_the_linear_model(linear, tokens, tmp_path):
    """Before and after, saved and loaded; at lengths beyond the levels, padded, with a cache."""
    ids, mask = tokens(2, 150), torch.ones(2, 150, dtype=torch.long)
    mask[0, :13] = 0
    want = linear(ids, attention_mask=mask).logits
    text = linear.generate(ids[:, :61], max_new_tokens=9, do_sample=False)
    before = {name: x.clone() for name, x in linear.state_dict().items()}
    report = loglinear.lift(linear)
    after = linear.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert {name.split("mixer.")[1] for name in after.keys() - before.keys()} == {
        "level_scale.L",
        "level_scale.dl_proj.weight",
    }
    assert report.added == sum(after[name].numel() for name in after.keys() - before.keys())
    assert report.before == sum(x.numel() for x in before.values())
    linear.save_pretrained(tmp_path)
    loaded = LogLinearForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    for model in (linear, loaded):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, want, rtol=0, atol=1e-10)
        assert torch.equal(model.generate(ids[:, :61], max_new_tokens=9, do_sample=False), text)
    assert torch.equal(linear(ids).logits, loaded(ids).logits)


def test_parameters_stand_in_the_order_of_a_log_linear_model(linear):
    """A saved optimizer knows parameters by their places alone."""
    loglinear.lift(linear)
    names = [name for name, _ in linear.named_parameters()]
    assert names == [name for name, _ in LogLinearForCausalLM(linear.config).named_parameters()]


def test_it_learns_from_the_first_step(linear, tokens):
    loglinear.lift(linear)
    ids = tokens(2, 100)
    before = linear(ids).logits.detach()
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        linear(ids, labels=ids).loss.backward()
        scales = [m for m in linear.modules() if isinstance(m, loglinear.layers.LevelScale)]
        assert scales
        assert all((m.dl_proj.weight.grad != 0).any() for m in scales)
        assert all((m.L.grad != 0).any() == (step > 0) for m in scales)  # λ moves with the projection, then with L
        optimizer.step()
    assert (linear(ids).logits - before).abs().max() > 1e-3


def test_the_report(make_model):
    report = loglinear.lift(make_model(["mamba2", "attention", "log_linear_mamba2"], level_scale_start="one"))
    assert report.lifted == ["model.layers.0.mixer"]
    assert report.left == {
        "model.layers.1.mixer": "attention is no linear mixer",
        "model.layers.2.mixer": "log-linear already",
    }
    assert str(report).startswith(f"1 layers lifted, {report.added:,} parameters added (")


def test_levels_of_ones_own(make_model, tokens, tmp_path):
    model = make_model("mamba2")
    loglinear.lift(model, num_levels=11)
    assert model.config.max_position_embeddings == 1024
    assert model.config.num_levels == model.model.layers[0].mixer.level_scale.L.shape[1] == 11
    model.save_pretrained(tmp_path)
    ids = tokens(1, 70)
    loaded = LogLinearForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-12)


def test_what_cannot_be_lifted_is_as_it_was(make_model):
    for mixer, message in {
        "attention": r"model must have a linear mixer, one of \['mamba2', .*\]: got \['attention'\]",
        "log_linear_mamba2": "model must have a linear mixer",
    }.items():
        model = make_model(mixer)
        before = dict(model.named_parameters())
        with pytest.raises(ValueError, match=message):
            loglinear.lift(model)
        assert dict(model.named_parameters()).keys() == before.keys()
    with pytest.raises(ValueError, match="got level_scale_start='paper'"):
        loglinear.lift(make_model(["mamba2", "attention", "log_linear_mamba2"]))
    with pytest.raises(ValueError, match=r"model must have a linear mixer, .*: got Linear with no mixer"):
        loglinear.lift(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be a module: got dict"):
        loglinear.lift({})
    with pytest.raises(ValueError, match="num_levels must be at least 1: got 0"):
        loglinear.lift(make_model("mamba2"), num_levels=0)


def test_levels_are_those_of_the_log_linear_layers_there(make_model):
    mixed = make_model(["mamba2", "attention", "log_linear_mamba2"], level_scale_start="one")
    with pytest.raises(
        ValueError, match="num_levels must be 7 or None, as the log-linear layers of the model have it: got 9"
    ):
        loglinear.lift(mixed, num_levels=9)
    assert loglinear.lift(mixed, num_levels=7).lifted
