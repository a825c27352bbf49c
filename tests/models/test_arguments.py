"""What a call may hold: both names of the cache, documents by every name, masks, and errors for everything else."""

import copy
import dataclasses
import pickle

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache, GPT2Config, GPT2LMHeadModel

from loglinear.models import LogLinearConfig, LogLinearForCausalLM, LogLinearModel

LENGTHS = [30, 1, 75, 12]
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_has_two_names(make_model, tokens, mixer, name):
    """As an argument and in what comes back, of both models, and out of a tuple."""
    model, ids = make_model(mixer), tokens(2, 70)
    want = model(ids).logits
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :66], **{name: cache})
    assert first.cache is first.past_key_values is cache
    rest = model(ids[:, 66:], **{name: first.cache})
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), want, rtol=0, atol=1e-9)
    base = model.model(ids, use_cache=True)
    assert base.cache is base.past_key_values is not None
    assert model.model(ids, use_cache=True, return_dict=False)[1].get_seq_length() == 70
    assert model.model(ids, use_cache=False).cache is None


def test_two_caches_are_refused(make_model, tokens):
    model = make_model("mamba2")
    caches = {name: DynamicCache(config=model.config) for name in ("cache", "past_key_values")}
    for part in (model, model.model):
        with pytest.raises(ValueError, match="cache and past_key_values are two names of one argument: got two"):
            part(tokens(1, 4), **caches)


@torch.no_grad()
def test_a_cache_of_other_rows_is_refused(make_model, tokens, mixer):
    """Before anything is written: the cache goes on as if nothing had happened."""
    model, ids = make_model(mixer), tokens(2, 9)
    for held, came in ((2, 1), (1, 3)):
        cache = DynamicCache(config=model.config)
        model(ids[:held], past_key_values=cache)
        message = f"past_key_values must hold as many rows as there are ids, {came}: got {held}"
        with pytest.raises(ValueError, match=message):
            model(tokens(came, 1), past_key_values=cache)
        assert cache.get_seq_length() == 9
        got = model(ids[:held, :2], past_key_values=cache).logits
        want = model(torch.cat([ids[:held], ids[:held, :2]], 1)).logits[:, -2:]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_unknown_arguments_are_named(make_model, tokens):
    model, ids = make_model("log_linear_mamba2"), tokens(1, 5)
    for part in (model, model.model):
        with pytest.raises(TypeError, match="forward does not know these arguments: atention_mask"):
            part(ids, atention_mask=torch.ones_like(ids))
    with pytest.raises(TypeError, match="forward does not know these arguments: labels"):
        model.model(ids, labels=ids)
    with pytest.raises(ValueError, match="labels must be given for shift_labels to have a meaning: got None"):
        model(ids, shift_labels=ids)
    with pytest.raises(ValueError, match="output_attentions must be false"):
        model(ids, output_attentions=True)


def test_generate_with_a_tokenizer(make_model, tokens):
    """As for stop strings, and as transformers' server calls it; another name is refused."""
    model, ids = make_model("log_linear_mamba2"), tokens(1, 20)
    want = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, tokenizer=object()), want)
    with pytest.raises(ValueError, match="token_type_ids"):
        model.generate(ids, max_new_tokens=3, token_type_ids=ids)


def test_documents_by_every_name(make_model, tokens, mixer):
    """cu_seq_lens_q and seq_idx of transformers' collator, cu_seqlens of flash-linear-attention, seq_idx in several rows."""
    model, ids = make_model(mixer), tokens(1, sum(LENGTHS))
    pieces = ids.split(LENGTHS, dim=1)
    want = torch.cat([model(piece).logits for piece in pieces], dim=1)
    seq_idx = torch.repeat_interleave(torch.arange(4, dtype=torch.int32), torch.tensor(LENGTHS)).unsqueeze(0)
    for told in (
        {"cu_seq_lens_q": OFFSETS},
        {"cu_seqlens": OFFSETS.int()},
        {"seq_idx": seq_idx},
        {"seq_idx": 5 - seq_idx},
    ):
        torch.testing.assert_close(model(ids, **told).logits, want, rtol=0, atol=1e-9)
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate([{"input_ids": piece[0]} for piece in pieces])
    assert {"seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q"} < batch.keys()
    torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=1e-9)
    rows, mask = torch.cat([ids, ids]), torch.ones(2, sum(LENGTHS))
    mask[1, :31] = 0
    got = model(rows, attention_mask=mask, seq_idx=torch.cat([seq_idx, seq_idx])).logits
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(got[1, 31:], want[0, 31:], rtol=0, atol=1e-9)


def test_documents_told_twice_must_agree(make_model, tokens):
    model, ids = make_model("mamba2"), tokens(1, sum(LENGTHS))
    with pytest.raises(ValueError, match=r"cu_seqlens must be the same offsets as cu_seq_lens_q: got \[0, 118\] and"):
        model(ids, cu_seq_lens_q=OFFSETS, cu_seqlens=torch.tensor([0, 118]))
    with pytest.raises(ValueError, match=r"seq_idx must have shape \[1, 118\]: got \[118\]"):
        model(ids, seq_idx=torch.zeros(118, dtype=torch.int32))
    positions = torch.arange(118).unsqueeze(0) % 50
    with pytest.raises(
        ValueError, match="position_ids must not start a document at column 50, inside one of cu_seq_lens_q"
    ):
        model(ids, cu_seq_lens_q=OFFSETS, position_ids=positions)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.tensor([[1, 1, 2, 2]]),
            "attention_mask must hold 1 for tokens and 0 for padding: got 2; numbers of doc",
        ),
        (torch.tensor([[float("-inf"), 0.0, 0.0, 0.0]]), "attention_mask must hold 1 for tokens.*got -inf"),
        (torch.zeros(1, 4), "attention_mask must hold 1 for tokens.*got floats that are all 0"),
        (torch.tensor([[0.5, 1.0, 1.0, 1.0]]), "got 0.5"),
        (torch.tensor([[1, -1, 1, 1]]), "got -1"),
        (torch.zeros(1, 1, 4, 4), "attention_mask must have shape"),
    ],
)
def test_masks_of_other_meanings_are_refused(make_model, tokens, mask, message):
    for name in ("log_linear_gated_deltanet", "attention"):
        with pytest.raises(ValueError, match=message):
            make_model(name)(tokens(1, 4), attention_mask=mask)


def test_masks_of_any_dtype(make_model, tokens):
    model, ids = make_model("log_linear_mamba2"), tokens(2, 9)
    mask = torch.ones(2, 9)
    mask[0, :4] = 0
    want = model(ids, attention_mask=mask).logits
    for dtype in (torch.bool, torch.int32, torch.float16):
        assert torch.equal(model(ids, attention_mask=mask.to(dtype)).logits, want)


def test_the_first_token_behind_padding_is_no_target(make_model, tokens, mixer):
    """Loss of a left-padded batch, with logits and without, and of documents: that of each alone, weighted by its targets."""
    model, lengths = make_model(mixer), [5, 30, 12]
    ids, mask = torch.full((3, 30), 7), torch.zeros(3, 30, dtype=torch.long)
    rows = [tokens(1, n) for n in lengths]
    for i, row in enumerate(rows):
        ids[i, 30 - lengths[i] :], mask[i, 30 - lengths[i] :] = row[0], 1
    labels = ids.masked_fill(mask == 0, -100)
    want = sum(model(row, labels=row).loss * (row.shape[1] - 1) for row in rows) / (sum(lengths) - 3)
    packed = torch.cat(rows, 1)
    calls = [
        {"input_ids": ids, "attention_mask": mask, "labels": labels},
        {"input_ids": packed, "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0), "labels": packed},
        {"input_ids": packed, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None], "labels": packed},
    ]
    for call in calls:
        for skip in (False, True):
            torch.testing.assert_close(model(**call, skip_logits=skip).loss.float(), want, rtol=1e-6, atol=0)
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)  # as they are: whoever shifts decides
    more = model(ids, attention_mask=mask, labels=labels, shift_labels=shifted).loss
    assert (more - want).abs() > 1e-4


def test_labels_with_logits_to_keep(make_model, tokens):
    """The loss is of all columns, the logits are those asked for."""
    model, ids = make_model("log_linear_mamba2"), tokens(2, 30)
    want = model(ids, labels=ids)
    for mode in (False, True):
        for keep, columns in ((3, slice(-3, None)), (torch.tensor([4, 0]), [4, 0])):
            got = model.train(mode)(ids, labels=ids, logits_to_keep=keep)
            torch.testing.assert_close(got.logits, want.logits[:, columns], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(got.loss.float(), want.loss, rtol=1e-6, atol=0)


def test_skipped_logits_say_so(make_model, tokens):
    model, ids = make_model("mamba2").train(), tokens(1, 9)
    out = model(ids, labels=ids)
    for copied in (out, copy.copy(out), pickle.loads(pickle.dumps(type(out)(loss=out.loss.detach())))):
        assert torch.equal(copied.loss, out.loss)
        assert not hasattr(copied, "logits")
        with pytest.raises(AttributeError, match="call it with skip_logits=False"):
            _ = copied.logits
    assert "logits" not in out
    assert "loss" in repr(out)
    assert out.to_tuple()[0] is out["loss"] is out.loss


def test_an_output_without_logits_has_only_fields_that_can_be_read(make_model, tokens):
    """FSDP reads them all."""
    output = make_model("mamba2").train()(input_ids=tokens(1, 8), labels=tokens(1, 8))
    read = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    assert read["loss"] is output.loss
    assert "logits" not in read


def test_labels_make_no_cache(make_model, tokens):
    model, ids = make_model("log_linear_mamba2"), tokens(1, 9)
    assert model(ids, labels=ids).cache is None
    assert model(ids, labels=ids, use_cache=True).cache is not None
    assert model(ids).cache is not None


def test_special_tokens_lie_in_the_vocabulary():
    for name, value in {"pad_token_id": -1, "bos_token_id": 99, "eos_token_id": [3, 99]}.items():
        with pytest.raises(ValueError, match=rf"{name} must be None or in \[0, vocab_size=99\): got (-1|99)"):
            LogLinearConfig(vocab_size=99, **{name: value})
    assert LogLinearConfig(vocab_size=99, eos_token_id=[3, 98]).eos_token_id == [3, 98]


def test_the_last_word_learns(make_model, tokens):
    model, ids = make_model("mamba2", pad_token_id=None), torch.tensor([[60, 5, 60, 7]])
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad[60].abs().max() > 0


def test_a_folder_of_another_architecture_is_refused(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20)).save_pretrained(tmp_path)
    for kind in (LogLinearForCausalLM, LogLinearModel, LogLinearConfig):
        with pytest.raises(ValueError, match=r"config\.json must be of model_type 'loglinear': got 'gpt2'"):
            kind.from_pretrained(tmp_path)


def test_a_checkpoint_without_weights_is_refused(make_model, tmp_path):
    """Weights that a fresh start cannot replace; the base model alone has no output layer."""
    model = make_model("log_linear_mamba2")
    weights = {name: x for name, x in model.state_dict().items() if "in_proj" not in name}
    model.save_pretrained(tmp_path / "part", state_dict=weights)
    with pytest.raises(
        ValueError, match=r"every weight of a LogLinearForCausalLM: 2 are missing, model.layers.0.mixer.in_p"
    ):
        LogLinearForCausalLM.from_pretrained(tmp_path / "part")
    model.model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"1 are missing, lm_head.weight"):
        LogLinearForCausalLM.from_pretrained(tmp_path / "base")
    assert LogLinearModel.from_pretrained(tmp_path / "base") is not None
