"""``generate`` in every mode against the same mode without a cache, which recomputes everything at each step."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache

running = Version(transformers.__version__)
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


@pytest.fixture
def speculative(make_model, tokens, mixer):
    """A model, a prompt that repeats itself, its greedy continuation across the end of a chunk, and options."""
    # Without a padding token: generate would take a generated one for padding.
    model, prompt = make_model(mixer, pad_token_id=None), tokens(1, 10).repeat(1, 6)
    options = {"max_new_tokens": 24, "do_sample": False}
    return model, prompt, model.generate(prompt, use_cache=False, **options), options


@pytest.mark.parametrize("drafted", [3, 10])
def test_prompt_lookup(speculative, drafted):
    """Drafts are n-grams of the text; those that are wrong are taken back."""
    model, prompt, want, options = speculative
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=drafted, **options), want)


@pytest.mark.parametrize("kind", ["attention", "log_linear_gated_deltanet", "itself"])
def test_assistant_model(speculative, make_model, mixer, kind):
    """Drafts of another model and of the model itself, whose drafts are all right. Both models take tokens back."""
    model, prompt, want, options = speculative
    plain = {"pad_token_id": None}
    assistant = make_model(mixer, **plain) if kind == "itself" else make_model(kind, 1, num_hidden_layers=1, **plain)
    if kind == "itself":
        assistant.generation_config.assistant_confidence_threshold = 0  # no draft ends early
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(model.generate(prompt, assistant_model=assistant, **options), want)
    if kind == "itself":
        assert len(calls) == 2, "right drafts were not accepted"


@pytest.mark.skipif(
    running < Version("5.24"), reason="transformers allows static caches in assisted generation from 5.24"
)
def test_speculation_over_static_caches(speculative, make_model):
    model, prompt, want, options = speculative
    assistant = make_model("log_linear_mamba2", seed=1, num_hidden_layers=1)
    assert torch.equal(model.generate(prompt, assistant_model=assistant, **STATIC, **options), want)
    cache = StaticCache(config=model.config, max_cache_len=100)  # drafts may go beyond the last token
    assert torch.equal(model.generate(prompt, past_key_values=cache, prompt_lookup_num_tokens=5, **options), want)


def test_early_exit(speculative):
    """Drafts come from the first layers of the model itself."""
    model, prompt, want, options = speculative
    assert torch.equal(model.generate(prompt, assistant_early_exit=1, **options), want)


def test_universal_assistant(speculative, make_model):
    """An assistant with a tokenizer of its own: the letters have other ids, and some pairs are one token."""
    model, prompt, want, options = speculative
    letters = [chr(ord("0") + i) for i in range(61)]
    own = letter_tokenizer(letters, [])
    other = letter_tokenizer(letters[::-1], [(a, b) for a, b in zip(letters[::2], letters[1::2])])
    assistant = make_model("log_linear_mamba2", seed=1, num_hidden_layers=1, vocab_size=len(other))
    got = model.generate(prompt, assistant_model=assistant, tokenizer=own, assistant_tokenizer=other, **options)
    assert torch.equal(got, want)


def letter_tokenizer(letters, pairs):
    """One id for each letter and then for each pair."""
    words = {word: i for i, word in enumerate([*letters, *map("".join, pairs)])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(words, pairs)))


def test_speculation_in_a_conversation(speculative, tokens):
    """One cache over two turns: what the first has recorded does not disturb the second."""
    model, prompt, want, options = speculative
    cache = DynamicCache(config=model.config)
    text = model.generate(prompt, past_key_values=cache, prompt_lookup_num_tokens=5, **options)
    assert torch.equal(text, want)
    text = torch.cat([text, tokens(1, 300)], dim=1)
    options["attention_mask"] = torch.ones_like(text)  # it may hold pad tokens
    fresh = model.generate(text, **options)
    with pytest.raises(
        ValueError, match=r"input_ids must be what the cache has not read.*got 384 columns and a mask of 384"
    ):
        model.generate(text, past_key_values=cache, prompt_lookup_num_tokens=5, **options)
    unread = text[:, cache.get_seq_length() :]
    if running < Version("5.23"):
        with pytest.raises(ValueError, match="attention_mask must have shape"):  # cut too short after the first draft
            model.generate(unread, past_key_values=cache, prompt_lookup_num_tokens=5, **options)
        return
    got = model.generate(unread, past_key_values=cache, prompt_lookup_num_tokens=5, **options)
    assert torch.equal(got[:, unread.shape[1] :], fresh[:, text.shape[1] :])
