"""Padding anywhere is no padding: logits, tokens, caches and gradients of each row equal those of the row alone."""

import pytest
import torch
from transformers import DynamicCache

LENGTHS = [5, 70, 41]
WIDTH = 70


@pytest.fixture
def rows(tokens):
    return [tokens(1, length) for length in LENGTHS]


def padded(rows, side, width=WIDTH):
    """ids and mask ``[B, width]``; the padding is an ordinary token, so that only the mask can tell."""
    ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        length = row.shape[1]
        columns = slice(width - length, width) if side == "left" else slice(0, length)
        ids[i, columns], mask[i, columns] = row[0], 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_each_row_alone(make_model, rows, mixer, side):
    model = make_model(mixer)
    ids, mask = padded(rows, side)
    out = model(ids, attention_mask=mask, output_hidden_states=True)
    for i, row in enumerate(rows):
        alone = model(row, output_hidden_states=True)
        real = mask[i].bool()
        torch.testing.assert_close(out.logits[i, real], alone.logits[0], rtol=0, atol=1e-9)
        for layer, want in zip(out.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(layer[i, real], want[0], rtol=0, atol=1e-9)


def test_holes_in_the_mask(make_model, tokens, mixer):
    """Masked tokens do not exist, wherever they stand and whatever positions the caller gives them."""
    model, ids = make_model(mixer), tokens(1, 90)
    mask = torch.ones(1, 90, dtype=torch.long)
    mask[0, [0, 1, 30, 31, 64, 89]] = 0
    want = model(ids[mask.bool()].unsqueeze(0)).logits[0]
    for position_ids in (None, torch.arange(90).unsqueeze(0), mask.cumsum(1) - 1):
        out = model(ids, attention_mask=mask, position_ids=position_ids).logits
        torch.testing.assert_close(out[mask.bool()], want, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk_size": 16}, {"num_beams": 2}, {"cache_implementation": "static"}]
)
def test_generated_tokens_equal_each_row_alone(make_model, rows, mixer, options):
    """With chunks of 16 the shortest row is all padding for four chunks. Decoding crosses chunk borders at 64."""
    model = make_model(mixer)
    ids, mask = padded(rows, "left")
    together = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
    for i, row in enumerate(rows):
        alone = model.generate(row, max_new_tokens=6, do_sample=False, num_beams=options.get("num_beams", 1))
        assert together[i, WIDTH:].tolist() == alone[0, row.shape[1] :].tolist()


def test_rows_keep_their_own_positions_in_the_cache(make_model, rows, mixer):
    model = make_model(mixer)
    ids, mask = padded(rows, "left")
    cache = model(ids, attention_mask=mask).past_key_values
    assert [layer.state.position.tolist() for layer in cache.layers] == [LENGTHS] * len(cache.layers)
    assert cache.get_seq_length() == WIDTH


def test_right_padding_then_more_tokens(make_model, rows, tokens, mixer):
    """The padding ends up in the middle. Rows go on from their own last token, one of them padded again."""
    model = make_model(mixer)
    ids, mask = padded(rows, "right")
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    more = tokens(3, 8)
    mask = torch.cat([mask, torch.ones_like(more)], dim=1)
    mask[1, -3:] = 0
    out = model(more, attention_mask=mask, past_key_values=cache).logits
    for i, row in enumerate(rows):
        count = 5 if i == 1 else 8
        whole = torch.cat([row, more[i : i + 1, :count]], dim=1)
        torch.testing.assert_close(out[i, :count], model(whole).logits[0, -count:], rtol=0, atol=1e-9)


def test_gradients_equal_each_row_alone(make_model, rows, mixer):
    model = make_model(mixer).train()
    ids, mask = padded(rows, "right")
    labels = ids.masked_fill(mask == 0, -100)
    model(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(1)).loss.backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    sum(model(row, labels=row, num_items_in_batch=torch.tensor(1)).loss for row in rows).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(  # transformers' loss is float32, and its gradients with it
            together[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_batch_of_nothing_but_padding(make_model, tokens, mixer):
    """The first chunks of a chunked prefill may hold no token at all; the state must stay at its start."""
    model, ids = make_model(mixer), tokens(2, 12)
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=torch.zeros(2, 12, dtype=torch.long), past_key_values=cache)
    mask = torch.cat([torch.zeros(2, 12), torch.ones(2, 12)], dim=1)
    out = model(ids, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(out, model(ids).logits, rtol=0, atol=1e-9)


def test_masks_of_a_wrong_shape_are_named(make_model, tokens):
    model = make_model("mamba2")
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[2, 12\].*got \[2, 11\]"):
        model(tokens(2, 12), attention_mask=torch.ones(2, 11))
    with pytest.raises(ValueError, match=r"attention_mask must have shape .*got \[2, 1, 12, 12\]"):
        model(tokens(2, 12), attention_mask=torch.ones(2, 1, 12, 12))
    with pytest.raises(ValueError, match=r"position_ids must have shape \[2, 12\]: got \[2, 5\]"):
        model(tokens(2, 12), position_ids=torch.zeros(2, 5, dtype=torch.long))
