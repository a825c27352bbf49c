"""The part of a mask that speaks of the past: what was read cannot be unsaid, but for the tails of softmax attention."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

pytestmark = pytest.mark.default_packages

EOS = 2

RECURRENT = [
    *("log_linear_mamba2", "mamba2", "log_linear_gated_deltanet", "log_linear_kda"),
    ["log_linear_mamba2", "attention", "log_linear_gated_deltanet"],
]


def make_cache(kind, model):
    return kind(config=model.config, **({"max_cache_len": 200} if kind is StaticCache else {}))


def conversation(model, tokens, cache):
    """A turn whose first row ends early, and the mask that a chat then makes: what stands behind its end is no token."""
    prompt, answer, question = tokens(2, 20), tokens(2, 6), tokens(2, 4)
    answer[0, 3:] = EOS
    text = torch.cat([prompt, answer], 1)
    model(text, past_key_values=cache)  # as generate has read it: the end of row 0 as tokens
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, 24:26] = 0
    return torch.cat([text, question], 1), mask


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_attention_drops_the_end_of_a_row(make_model, tokens, kind):
    """The next turn is that of a model without a cache, call after call."""
    model = make_model("attention")
    cache = make_cache(kind, model)
    text, mask = conversation(model, tokens, cache)
    got = model(text[:, 26:], attention_mask=mask, past_key_values=cache).logits
    want = model(text, attention_mask=mask).logits[:, 26:]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    assert cache.layers[0].state.position.tolist() == [28, 30]
    more, longer = tokens(2, 1), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    got = model(more, attention_mask=longer, past_key_values=cache).logits
    want = model(torch.cat([text, more], 1), attention_mask=longer).logits[:, -1:]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    cache.crop(-3)  # in columns, of which the dropped ones are no tokens
    assert cache.layers[0].state.position.tolist() == [26, 28]


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("name", RECURRENT, ids=str)
def test_states_refuse_it(make_model, tokens, name, kind):
    """Naming the row, before anything is written; a generate of the next turn too."""
    model = make_model(name)
    cache = make_cache(kind, model)
    text, mask = conversation(model, tokens, cache)
    message = (
        r"attention_mask must say of the 26 columns in the cache what it said when they were read: rows \[0\] differ"
    )
    with pytest.raises(ValueError, match=message):
        model(text[:, 26:], attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        model.generate(text, attention_mask=mask, past_key_values=cache, max_new_tokens=2)
    got = model(text[:, 26:], attention_mask=torch.ones_like(mask), past_key_values=cache).logits
    torch.testing.assert_close(got, model(text).logits[:, 26:], rtol=0, atol=1e-9)


@torch.no_grad()
def test_what_no_mixer_can_undo(make_model, tokens):
    """A token in the middle that others have seen, and a column that was padding."""
    model = make_model("attention")
    ids, padded = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    padded[1, :2] = 0
    cache = model(ids[:, :8], attention_mask=padded[:, :8]).past_key_values
    hole = padded.clone()
    hole[2, 4] = 0
    for mask, rows in ((hole, r"\[2\]"), (torch.ones_like(padded), r"\[1\]")):
        with pytest.raises(ValueError, match=f"rows {rows} differ"):
            model(ids[:, 8:], attention_mask=mask, past_key_values=cache)
    got = model(ids[:, 8:], attention_mask=padded, past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids, attention_mask=padded).logits[:, 8:], rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_finished_row_that_reads_nothing(make_model, tokens, mixer):
    """What the page on models advises: new columns of a finished row are padding when they are read. Exact for every mixer."""
    model, ids = make_model(mixer), tokens(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, 23:26] = 0
    cache, pieces = DynamicCache(config=model.config), []
    for start, stop in ((0, 20), *((t, t + 1) for t in range(20, 26)), (26, 30)):
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        pieces.append(out.logits)
    want = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], want[mask.bool()], rtol=0, atol=1e-9)
    assert cache.layers[0].state.position.tolist() == [27, 30]
