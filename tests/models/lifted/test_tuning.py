"""Lifted models under the tools that train others: Trainer, gradient checkpointing, adapters of peft."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import loglinear
from loglinear.models.levels import level_parameters, level_scales

OWN = "ours"
FAMILIES = [OWN, "mamba2", "bamba"]
# transformers 5.23 prefers activation_checkpointing_enable, which 5.17 does not have.
renamed = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
asks_by_the_old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def lifted(make_family, make_model):
    """``lifted(family, **options of lift)``: in float32 and training mode."""

    def make(family, **options):
        if family == OWN:
            model = make_model(["mamba2", "attention", "gated_deltanet"]).float()
        else:
            model = make_family(family)
        loglinear.lift(model, num_levels=6, **options)
        return model.train()

    return make


def texts(length=32, period=4):
    """Sixteen texts that repeat four tokens."""
    starts = torch.randint(3, 60, (16, period), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": s.repeat(length // period), "labels": s.repeat(length // period)} for s in starts]


def train(model, output, steps=10):
    """The losses of some steps of the Trainer."""
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=steps, per_device_train_batch_size=8, learning_rate=2e-2, logging_steps=1,
        lr_scheduler_type="constant", save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False, seed=1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=texts())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def copies(model):
    return {name: x.detach().clone() for name, x in model.named_parameters()}


@torch.no_grad()
def scales_of(model, seed=3):
    """λ of every lifted layer, for one and the same input."""
    made = []
    for module in level_scales(model).values():
        hidden = torch.randn(1, 9, module.dl_proj.in_features, generator=torch.Generator().manual_seed(seed))
        made.append(module(hidden))
    return made


@pytest.mark.parametrize(("family", "which"), [(OWN, "all"), ("mamba2", "all"), ("mamba2", "levels")])
def test_the_trainer_lowers_the_loss_and_moves_the_levels(family, which, lifted, tmp_path):
    model = lifted(family, train=which)
    before = copies(model)
    assert all((scales - 1).abs().max() < 1e-6 for scales in scales_of(model))
    losses = train(model, tmp_path)
    assert sum(losses[-3:]) / 3 < losses[0] * (0.7 if which == "all" else 0.99)
    assert all((scales - 1).abs().max() > 1e-2 for scales in scales_of(model))
    changed = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    if which == "levels":
        assert changed == level_parameters(model).keys()
    else:
        assert level_parameters(model).keys() < changed


@renamed
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", ["all", "levels"])
def test_gradient_checkpointing_changes_no_gradient(family, which, lifted, ids):
    """Where the embedding is frozen, too."""
    model, tokens = lifted(family, train=which), ids(2, 40)
    calls = []
    next(iter(level_scales(model).values())).register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        model.zero_grad()
        calls.clear()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}

    want = gradients()
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    got = gradients()
    assert len(calls) == 2, "the layer must have run again in the backward pass"
    assert got.keys() == want.keys()
    assert {name for name in level_parameters(model) if name.endswith("dl_proj.weight")} <= want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)
    assert all(gradient.abs().max() > 0 for name, gradient in want.items() if name.endswith("dl_proj.weight"))


@asks_by_the_old_name
@pytest.mark.parametrize(("family", "levels"), [(OWN, False), (OWN, True), ("bamba", True)])
def test_adapters_on_top(family, levels, lifted, ids, tmp_path):
    """LoRA trains its own parameters and, if asked, the levels; an adapter comes back on the lifted base."""
    peft = pytest.importorskip("peft")
    model, tokens = lifted(family), ids(2, 40)
    folder, before = tmp_path / "base", copies(model)
    model.save_pretrained(folder)
    with torch.no_grad():
        want = model.eval()(tokens, use_cache=False).logits
    options = {"modules_to_save": ["level_scale"]} if levels else {}
    config = peft.LoraConfig(r=2, target_modules=["in_proj"], **options)  # peft refuses out_proj of Mamba-2
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        torch.testing.assert_close(tuned(tokens, use_cache=False).logits, want, rtol=1e-5, atol=1e-5)
    trained = {name for name, x in tuned.named_parameters() if x.requires_grad}
    assert trained
    assert {"lora_" in name or "level_scale.modules_to_save" in name for name in trained} == {True}
    assert any("level_scale" in name for name in trained) == levels
    train(tuned.train(), tmp_path / "run", steps=3)
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", ""): x
        for name, x in tuned.named_parameters()
        if name not in trained
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in after.items())
    moved = [(scales - 1).abs().max() > 1e-3 for scales in scales_of(tuned.merge_and_unload() if not levels else tuned)]
    assert any(moved) == levels


@asks_by_the_old_name
def test_an_adapter_comes_back_on_the_lifted_base(lifted, ids, tmp_path):
    """By peft alone: the folder of the adapter names the folder of the base, and transformers lifts it while loading."""
    peft = pytest.importorskip("peft")
    lifted("mamba2").save_pretrained(tmp_path / "base")
    base = type(lifted("mamba2")).from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["in_proj"], modules_to_save=["level_scale"], task_type="CAUSAL_LM")
    tuned, tokens = peft.get_peft_model(base, config), ids(2, 40)
    train(tuned.train(), tmp_path / "run", steps=3)
    tuned.eval().save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        want = tuned(tokens, use_cache=False).logits
        assert torch.equal(again(tokens, use_cache=False).logits, want)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(tokens, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(base).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens, use_cache=False).logits, merged(tokens, use_cache=False).logits)
