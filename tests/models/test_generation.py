"""``generate`` in every mode against the same mode without a cache, which recomputes everything at each step."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

PROMPT, NEW = 61, 8  # the fourth new token opens a second chunk of 64


@pytest.fixture
def both(make_model, tokens, mixer):
    """``both(**options)``: tokens with a cache, tokens without one."""
    model, prompt = make_model(mixer), tokens(2, PROMPT)

    def run(cached=None, **options):
        torch.manual_seed(1)
        without = model.generate(prompt, max_new_tokens=NEW, use_cache=False, **options)
        torch.manual_seed(1)
        return model.generate(prompt, max_new_tokens=NEW, **options, **(cached or {})), without

    return run


DYNAMIC, STATIC = {}, {"cache_implementation": "static"}


def test_greedy(both):
    with_cache, without = both(do_sample=False)
    assert torch.equal(with_cache, without)
    assert len(set(without[:, PROMPT:].flatten().tolist())) > 4, "a constant output would hide a wrong state"


@pytest.mark.parametrize("cached", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_sampled(both, cached):
    with_cache, without = both(do_sample=True, temperature=2.0, num_return_sequences=2, cached=cached)
    assert torch.equal(with_cache, without)
    assert not torch.equal(without[0], without[1])


@pytest.mark.parametrize("cached", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_beam(both, cached):
    with_cache, without = both(num_beams=3, num_return_sequences=3, do_sample=False, cached=cached)
    assert torch.equal(with_cache, without)


def test_static_cache(both):
    with_cache, without = both(do_sample=False, cached=STATIC)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("cached", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("chunk", [7, 60])
def test_chunked_prefill(both, chunk, cached):
    with_cache, without = both(do_sample=False, cached={"prefill_chunk_size": chunk} | cached)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_cache_reuse_across_calls(make_model, tokens, mixer, kind):
    """A conversation: prompt, answer, prompt, answer, with one cache; each turn equals a fresh start on the whole text.

    ``generate`` takes the cache by either name, whichever its version of transformers knows.
    """
    name = "cache" if kind is DynamicCache else "past_key_values"
    model = make_model(mixer)
    cache = kind(config=model.config, **({"max_cache_len": 200} if kind is StaticCache else {}))
    text = tokens(2, 30)
    for turn in (tokens(2, 0), tokens(2, 40), tokens(2, 3)):
        text = torch.cat([text, turn], dim=1)
        # A generated word may be the padding token: without a mask generate would take it for padding.
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(text)}
        fresh = model.generate(text, **options, use_cache=False)
        text = model.generate(text, **options, **{name: cache})
        assert torch.equal(text, fresh)
        assert cache.get_seq_length() == text.shape[1] - 1  # the last token has not been read yet


@torch.no_grad()
def test_a_copied_cache_serves_several_continuations(make_model, tokens, mixer):
    model, prefix = make_model(mixer), tokens(1, 70)
    cache = model(prefix).past_key_values
    for ending in (tokens(1, 5), tokens(1, 9)):
        text = torch.cat([prefix, ending], dim=1)
        continued = model.generate(text, max_new_tokens=4, do_sample=False, past_key_values=copy.deepcopy(cache))
        assert torch.equal(continued, model.generate(text, max_new_tokens=4, do_sample=False))


@torch.no_grad()
def test_decoded_logits_equal_one_pass(make_model, tokens, mixer):
    """Token by token, two at a time, then many: the logits of the single pass, to rounding."""
    model, ids = make_model(mixer), tokens(2, 140)
    want = model(ids, use_cache=False).logits
    cache, pieces = DynamicCache(config=model.config), []
    for piece in ids.split([62, 1, 1, 1, 2, 73], dim=1):
        pieces.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), want, rtol=0, atol=1e-9)


def test_assisted_generation_of_attention_models(make_model, tokens):
    """Drafts by n-gram lookup and by another model are taken back where they are wrong."""
    model, assistant = make_model("attention"), make_model("attention", seed=1, num_hidden_layers=1)
    prompt = tokens(1, 6).repeat(1, 4)
    want = model.generate(prompt, max_new_tokens=NEW, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=3), want)
    assert torch.equal(model.generate(prompt, max_new_tokens=NEW, do_sample=False, assistant_model=assistant), want)


def test_assisted_generation_of_other_models_is_refused(make_model, tokens):
    recurrent, attention = make_model("log_linear_mamba2"), make_model("attention")
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        recurrent.generate(tokens(1, 6), max_new_tokens=4, do_sample=False, assistant_model=attention)
    with pytest.raises(ValueError, match="merge tokens for good, so use generate without an assistant"):
        attention.generate(tokens(1, 6), max_new_tokens=4, do_sample=False, assistant_model=recurrent)
