"""Packed documents equal the documents alone, whoever packs them and however the borders are told."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache

pytestmark = pytest.mark.default_packages

LENGTHS = [30, 1, 75, 12]


@pytest.fixture
def documents(tokens):
    return [tokens(length) for length in LENGTHS]


@pytest.mark.parametrize("flash_kwargs", [True, False], ids=["cu_seq_lens", "position_ids"])
def test_collated_documents_equal_each_alone(make_model, documents, mixer, flash_kwargs):
    """Logits and loss of transformers' own packing collator."""
    model = make_model(mixer)
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=flash_kwargs)([{"input_ids": d} for d in documents])
    out = model(**batch)
    alone = [model(d.unsqueeze(0), labels=d.unsqueeze(0)) for d in documents if len(d) > 1]
    want = torch.cat([model(d.unsqueeze(0)).logits[0] for d in documents])
    torch.testing.assert_close(out.logits[0], want, rtol=0, atol=1e-9)
    targets = torch.tensor([n - 1.0 for n in LENGTHS if n > 1])
    want = (torch.stack([one.loss for one in alone]) * targets).sum() / targets.sum()
    torch.testing.assert_close(out.loss, want, rtol=1e-6, atol=0)  # transformers' loss is float32
    assert out.past_key_values is None, "a cache of documents would not belong to the row"


def test_position_ids_that_restart_in_several_rows(make_model, documents, tokens, mixer):
    """Two rows, documents of different lengths in each; the second row starts in the middle of one."""
    model = make_model(mixer)
    ids = torch.stack([torch.cat(documents), tokens(sum(LENGTHS))])
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in LENGTHS]), torch.cat([torch.arange(9, 60), torch.arange(67)])]
    )
    out = model(ids, position_ids=positions).logits
    want = torch.cat([model(d.unsqueeze(0)).logits[0] for d in documents])
    torch.testing.assert_close(out[0], want, rtol=0, atol=1e-9)
    want = torch.cat([model(piece.unsqueeze(0)).logits[0] for piece in ids[1].split([51, 67])])
    torch.testing.assert_close(out[1], want, rtol=0, atol=1e-9)


def test_padded_rows_of_documents(make_model, documents, mixer):
    """Packed rows that end in padding: a mask and restarting positions together."""
    model = make_model(mixer)
    ids = torch.stack([torch.cat(documents), torch.cat([documents[2], documents[0], torch.full((13,), 7)])])
    mask = torch.ones_like(ids)
    mask[1, 105:] = 0
    positions = torch.zeros_like(ids)
    positions[0] = torch.cat([torch.arange(n) for n in LENGTHS])
    positions[1, :105] = torch.cat([torch.arange(75), torch.arange(30)])
    out = model(ids, attention_mask=mask, position_ids=positions).logits
    want = torch.cat([model(documents[i].unsqueeze(0)).logits[0] for i in (2, 0)])
    torch.testing.assert_close(out[1, :105], want, rtol=0, atol=1e-9)


def test_no_gradient_crosses_a_border(make_model, documents, mixer):
    """Exactly zero, through convolution, state and softmax; and not zero inside the document."""
    model = make_model(mixer)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    embeds = model.model.embed_tokens(torch.cat(documents).unsqueeze(0)).detach().requires_grad_()
    out = model(inputs_embeds=embeds, cu_seq_lens_q=cu_seqlens).logits
    out[0, 31:106].square().sum().backward()
    assert embeds.grad[0, :31].abs().max() == 0
    assert embeds.grad[0, 106:].abs().max() == 0
    assert (embeds.grad[0, 31:106].abs().amax(-1) > 0).all()


def test_positions_that_only_go_on_are_one_document(make_model, tokens, mixer):
    model, ids = make_model(mixer), tokens(2, 70)
    want = model(ids).logits
    for positions in (torch.arange(70).unsqueeze(0), torch.arange(1000, 1070).expand(2, -1)):
        assert torch.equal(model(ids, position_ids=positions).logits, want)


def test_what_documents_cannot_do_is_named(make_model, documents, tokens):
    model = make_model("log_linear_mamba2")
    ids, cu_seqlens = torch.cat(documents).unsqueeze(0), torch.tensor([0, *LENGTHS]).cumsum(0)
    with pytest.raises(ValueError, match="past_key_values must be None for packed documents"):
        model(ids, cu_seq_lens_q=cu_seqlens, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="cu_seq_lens_q packs documents in a batch of one: got a batch of 2"):
        model(tokens(2, 9), cu_seq_lens_q=torch.tensor([0, 4, 9]))
    for ends in ([0, 4], [1, 9], [0, 5, 4, 9], []):
        with pytest.raises(ValueError, match="cu_seq_lens_q must be offsets from 0 to T=9 that do not decrease: got"):
            model(tokens(1, 9), cu_seq_lens_q=torch.tensor(ends))
    with pytest.raises(ValueError, match="attention_mask must be None together with cu_seq_lens_q"):
        model(ids, cu_seq_lens_q=cu_seqlens, attention_mask=torch.ones_like(ids))
