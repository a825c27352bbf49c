"""A lifted model writes what the original writes, token for token, in every way of ``generate``."""

import copy
import inspect

import pytest
import torch

import loglinear
from loglinear.models.lifted.cache import LiftedCacheLayer

FAMILIES = ["mamba2", "bamba", "qwen3_next"]
LONG = {"max_new_tokens": 12, "min_new_tokens": 12}  # from 61 columns over the end of a chunk of 64
WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "several": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "static beams": {"do_sample": False, "num_beams": 2, "cache_implementation": "static"},
    "in parts": {"do_sample": False, "prefill_chunk_size": 7},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, make_family):
    """The original, and the same model lifted."""
    before = make_family(request.param, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    after = copy.deepcopy(before)
    loglinear.lift(after, num_levels=6)  # 8 levels are seen: some share the last one's λ
    return before, after


@pytest.fixture
def prompt(ids):
    return ids(2, 61)


def text(model, ids, **options):
    torch.manual_seed(0)
    return model.generate(ids, **LONG, **options)


def cache_name(model):
    """The name of the cache argument, which differs from family to family and from version to version."""
    known = inspect.signature(model.forward).parameters
    return next(name for name in ("cache", "past_key_values", "cache_params") if name in known)


@pytest.mark.parametrize("way", WAYS)
def test_token_for_token(pair, prompt, way):
    before, after = pair
    if way == "in parts" and type(before).__name__ == "Mamba2ForCausalLM":
        for model in pair:
            with pytest.raises(ValueError, match=r"without a cache|only contain LinearAttention layers"):
                text(model, prompt, **WAYS[way])
        return
    assert torch.equal(text(after, prompt, **WAYS[way]), text(before, prompt, **WAYS[way]))


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe", "olmo_hybrid"])
def test_the_other_families_write_the_same(make_family, prompt, family):
    before = make_family(family, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    after = copy.deepcopy(before)
    loglinear.lift(after, num_levels=6)
    assert torch.equal(text(after, prompt, do_sample=False), text(before, prompt, do_sample=False))


@pytest.mark.parametrize("way", ["greedy", "beams", "static"])
def test_left_padding(pair, prompt, way):
    before, after = pair
    mask = torch.ones_like(prompt)
    mask[0, :17] = 0
    prompt = prompt.masked_fill(mask == 0, 0)
    want = text(before, prompt, attention_mask=mask, **WAYS[way])
    assert torch.equal(text(after, prompt, attention_mask=mask, **WAYS[way]), want)
    assert torch.equal(want[:1, 17:], text(after, prompt[:1, 17:], **WAYS[way]))


def test_a_second_turn_goes_on_from_the_cache(pair, prompt):
    """And the cache holds log-linear states in the places of the linear ones."""
    turns = []
    for model in pair:
        first = text(model, prompt[:, :30], do_sample=False, return_dict_in_generate=True)
        cache = first["cache" if "cache" in first else "past_key_values"]
        whole = torch.cat([first.sequences, prompt[:, 30:]], 1)
        turns.append(text(model, whole, do_sample=False, **{cache_name(model): cache}))
    assert torch.equal(*turns)
    linear = sum(kind == "linear_attention" for kind in pair[1].config.layer_types)
    assert sum(isinstance(layer, LiftedCacheLayer) for layer in cache.layers) == linear > 0


def test_assisted_generation_is_refused_as_by_the_original(pair, prompt):
    for model in pair:
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            text(model, prompt[:1], prompt_lookup_num_tokens=3)
