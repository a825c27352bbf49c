"""Training: the loss, gradient checkpointing, and transformers' Trainer with resuming."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, Trainer, TrainingArguments

from loglinear.models import LogLinearForCausalLM
from loglinear.training.model import compile_blocks

# transformers 5.23 prefers activation_checkpointing_enable, which 5.17 does not have.
renamed = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


def test_loss_is_the_mean_over_targets(make_model, tokens, mixer):
    model, ids = make_model(mixer), tokens(2, 30)
    labels = ids.clone()
    labels[0, :11] = -100
    out = model(ids, labels=labels)
    log_probs = F.log_softmax(out.logits[:, :-1], dim=-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    want = -log_probs[labels[:, 1:] != -100].mean()
    torch.testing.assert_close(out.loss.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kept", [True, False])
def test_dtype_of_the_residual_stream_under_autocast(make_model, tokens, mixer, kept):
    model = make_model(mixer, residual_in_fp32=kept).float()
    ids, seen = tokens(2, 30), []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert set(seen) == {torch.float32 if kept else torch.bfloat16}
    # Measured: rounding costs up to 0.3% of the loss with a stream of 32 bits and up to 1.2% of 16.
    torch.testing.assert_close(loss, model(ids, labels=ids).loss, rtol=0.02, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def compare_with_logits(model, ids, **inputs):
    """Loss and gradients with and without logits, by the same formula."""
    want = model(ids, skip_logits=False, **inputs)
    assert want.logits.shape == (*ids.shape, model.config.vocab_size)
    got = model(ids, **inputs)
    assert "logits" not in got
    parameters = list(model.parameters())
    pairs = zip(*([out.loss, *torch.autograd.grad(out.loss, parameters)] for out in (got, want)), strict=True)
    for x, y in pairs:
        assert (x - y).norm() <= 1e-5 * y.norm()  # the loss with logits is a float32 sum
    assert got.loss != model(ids, labels=ids).loss


@pytest.mark.parametrize("tied", [False, True])
def test_training_computes_the_loss_without_logits(make_model, tokens, tied):
    """Also with ignored labels, the Trainer's number of targets, another ignored index, and labels that are shifted already."""
    model, ids = make_model("log_linear_mamba2", tie_word_embeddings=tied).train(), tokens(2, 30)
    labels = ids.clone()
    labels[0, :11] = -100
    compare_with_logits(model, ids, labels=labels)
    compare_with_logits(model, ids, labels=labels, num_items_in_batch=torch.tensor(70))
    compare_with_logits(model, ids, labels=labels, num_items_in_batch=70)
    compare_with_logits(model, ids, labels=ids, shift_labels=labels)
    compare_with_logits(model, ids, labels=labels.masked_fill(labels == -100, 7), ignore_index=7)


def test_no_target_is_a_step_of_zero(make_model, tokens):
    model, ids = make_model("mamba2").train(), tokens(1, 8)
    loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=torch.tensor(0)).loss
    assert loss.isnan()
    assert all((x == 0).all() for x in torch.autograd.grad(loss, list(model.parameters())))


def test_who_gets_logits(make_model, tokens):
    """Evaluation, a loss of one's own and an output layer of one's own; a resized vocabulary changes nothing."""
    model, ids = make_model("mamba2"), tokens(2, 9)
    whole = model(ids, labels=ids)
    assert whole.logits is not None
    alone = model(ids, labels=ids, skip_logits=True, return_dict=False)
    assert len([x for x in alone if isinstance(x, torch.Tensor)]) == 1
    torch.testing.assert_close(alone[0].float(), whole.loss)
    with pytest.raises(ValueError, match="skip_logits must be false or None without labels"):
        model(ids, skip_logits=True)
    model.train()
    model.resize_token_embeddings(70)
    out = model(ids, labels=ids)
    assert "logits" not in out
    model.lm_head = torch.nn.Sequential(model.lm_head)
    torch.testing.assert_close(model(ids, labels=ids).loss.double(), out.loss)
    assert model(ids, labels=ids).logits.shape == (2, 9, 70)
    model.lm_head = model.lm_head[0]
    model.loss_function = lambda logits, **_: logits.mean()
    out = model(ids, labels=ids)
    assert torch.equal(out.loss, out.logits.mean())


def test_logits_to_keep(make_model, tokens):
    model, ids = make_model("mamba2"), tokens(2, 30)
    logits = model(ids).logits
    # A product of fewer rows may be summed in another order: that is up to the processor.
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:], rtol=1e-12, atol=1e-12)
    kept = model(ids, logits_to_keep=torch.tensor([4, 0])).logits
    torch.testing.assert_close(kept, logits[:, [4, 0]], rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at what it traces
def test_compiled_blocks_are_one_graph_and_change_no_gradient(make_model, tokens, mixer):
    """A step is compiled without a break, once for all blocks of one mixer, and gives the numbers of an eager step."""
    model, ids = make_model(mixer).train(), tokens(2, 70)
    want = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(model, backend="aot_eager")
    for _ in range(2):
        got = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    kinds = len(set(model.config.layer_mixers))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == kinds
    assert not torch._dynamo.utils.counters["graph_break"]
    for x, y in zip(got, want, strict=True):
        assert (x - y).norm() <= 1e-6 * y.norm()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_blocks_take_packed_documents(make_model, tokens):
    """In one graph too: the offsets on the CPU, for eager code to check, are nothing for it to read."""
    model, ids = make_model("log_linear_mamba2", num_hidden_layers=1).train(), tokens(1, 70)
    packed = {"labels": ids, "cu_seq_lens_q": torch.tensor([0, 4, 70])}
    want = torch.autograd.grad(model(ids, **packed).loss, list(model.parameters()))
    torch._dynamo.reset()
    compile_blocks(model, backend="eager")
    got = torch.autograd.grad(model(ids, **packed).loss, list(model.parameters()))
    for x, y in zip(got, want, strict=True):
        assert (x - y).norm() <= 1e-6 * y.norm()


@renamed
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(make_model, tokens, mixer, use_reentrant):
    model, ids = make_model(mixer).train(), tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0

    def gradients():
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    want = gradients()
    calls = []
    handle = model.model.layers[1].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    got = gradients()
    handle.remove()
    assert len(calls) == 2, "the layer must have run again in the backward pass"
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-12)


@renamed
def test_gradient_checkpointing_and_a_cache_exclude_each_other(make_model, tokens):
    model, ids = make_model("log_linear_mamba2").train(), tokens(1, 8)
    model.gradient_checkpointing_enable()
    assert model(ids, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="past_key_values must be None under gradient checkpointing"):
        model(ids, past_key_values=DynamicCache(config=model.config))


def test_training_makes_no_cache_unless_asked(make_model, tokens):
    model, ids = make_model("log_linear_mamba2"), tokens(1, 8)
    assert model(ids).past_key_values is not None
    model.train()
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 8


def cycle(length=40, period=5):
    """Sixteen texts that repeat five tokens: easy to learn, and not by frequency alone."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(3, 60, (16, period), generator=generator)
    return [{"input_ids": s.repeat(length // period), "labels": s.repeat(length // period)} for s in starts]


def make_trainer(config, output, steps):
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=4,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return Trainer(LogLinearForCausalLM(config), arguments, train_dataset=cycle())


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", ["log_linear_mamba2", "log_linear_gated_deltanet", "attention"])
def test_trainer_learns_and_resumes(config_of, name, tmp_path):
    """The loss falls well below that of token frequencies, and a run cut at step 4 goes on as if it had not been."""
    config = config_of(name, initializer_range=0.05)
    whole = make_trainer(config, tmp_path / "whole", steps=24)
    whole.train()
    curve = losses(whole)
    assert curve[0] == pytest.approx(torch.log(torch.tensor(61.0)).item(), abs=0.3)
    assert sum(curve[-4:]) / 4 < 0.8 * curve[0]

    first = make_trainer(config, tmp_path / "cut", steps=4)
    first.train()
    resumed = make_trainer(config, tmp_path / "cut", steps=8)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == curve[:8]
