"""Lifted Kimi Delta Attention and lightning attention of transformers: the originals until they are trained."""

import copy

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

import loglinear
from loglinear.layers import LevelScale
from loglinear.models.lifted.cache import ListedStates

LIFTED = {"kimi": ["model.layers.0.self_attn", "model.layers.2.self_attn"]}
LIFTED["minimax"] = ["model.layers.1.self_attn", "model.layers.2.self_attn"]
WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 20},
}


@pytest.fixture(scope="module", params=LIFTED)
def pair(request, make_family):
    """The original, and the same model lifted."""
    before = make_family(request.param, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    after = copy.deepcopy(before)
    report = loglinear.lift(after, num_levels=6)  # 131 tokens have 9 levels: some share the last one's λ
    assert report.lifted == LIFTED[request.param]
    assert all("no linear mixer" in reason for reason in report.left.values())
    assert not {*report.left} & {*report.lifted}
    return before, after


def close(one, other, tolerance):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.detach().abs().max()))


def text(model, ids, **options):
    torch.manual_seed(0)
    return model.generate(ids, max_new_tokens=8, min_new_tokens=8, **options)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 64, 131])
def test_logits(pair, length, ids):
    """Measured: 4e-6 of the largest logit apart (KDA), 4e-7 (lightning attention)."""
    tokens = ids(2, length)
    before, after = (model(tokens).logits for model in pair)
    close(after, before, 2e-5)


def test_tensors_keep_their_names(pair):
    before, after = (model.state_dict() for model in pair)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    added = {name.partition("self_attn.")[2] for name in after.keys() - before.keys()}
    assert added == {"level_scale.L", "level_scale.dl_proj.weight"}


@pytest.mark.parametrize("way", WAYS)
def test_token_for_token(pair, ids, way):
    before, after = pair
    tokens = ids(2, 61)
    mask = torch.ones_like(tokens)
    mask[0, :13] = 0
    options = {"attention_mask": mask, **WAYS[way]}
    assert torch.equal(text(after, tokens, **options), text(before, tokens, **options))


def test_beams(pair, ids):
    """The cache of MiniMax does not reorder its list, so the original without a cache is the guide."""
    tokens = ids(2, 61)
    got = text(pair[1], tokens, do_sample=False, num_beams=3)
    assert torch.equal(got, text(pair[0], tokens, do_sample=False, num_beams=3, use_cache=False))


@torch.no_grad()
def test_a_step_is_the_whole_sequence_where_levels_are_trained(pair, ids):
    model, tokens = copy.deepcopy(pair[1]), ids(2, 70)
    for module in model.modules():
        if isinstance(module, LevelScale):
            torch.nn.init.normal_(module.dl_proj.weight, std=0.3)
    whole = model(tokens, use_cache=False).logits
    assert not torch.allclose(whole, pair[1](tokens, use_cache=False).logits, atol=1e-2)
    out = model(tokens[:, :62], use_cache=True)
    name = "cache" if "cache" in out else "past_key_values"
    parts, cache = [out.logits], out[name]
    for part in tokens[:, 62:].split(4, dim=1):
        places = torch.arange(cache.get_seq_length(), cache.get_seq_length() + part.shape[1])[None]
        parts.append(model(part, position_ids=places, use_cache=True, **{name: cache}).logits)
    close(torch.cat(parts, 1), whole, 2e-5)


def test_training_reaches_the_levels(pair, ids):
    model = copy.deepcopy(pair[1]).train()
    tokens = ids(1, 40)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    scales = [module for module in model.modules() if isinstance(module, LevelScale)]
    assert [bool((x.dl_proj.weight.grad != 0).any()) for x in scales] == [True, True]


def test_a_saved_model_comes_back_lifted(pair, ids, tmp_path):
    pair[1].save_pretrained(tmp_path)
    again = type(pair[0]).from_pretrained(tmp_path)
    tokens = ids(1, 40)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, pair[1](tokens).logits)
    assert sum(isinstance(module, LevelScale) for module in again.modules()) == 2


def mixer_of(kind, **fields):
    """A tiny mixer of GLM or Ling in a module, with random weights."""
    module, name, config = kind
    if not hasattr(transformers.models, module):
        pytest.skip(f"transformers {transformers.__version__} has no {module}")
    made = getattr(getattr(transformers.models, module), f"modeling_{module}")
    config = getattr(transformers, config)(hidden_size=32, num_hidden_layers=2, **fields)
    mixer = getattr(made, name)(config, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return torch.nn.ModuleList([mixer])


GLM = ("glm5_next", "Glm5NextTextLinearAttention", "Glm5NextTextConfig")
LING = ("bailing_hybrid", "BailingHybridDeltaAttention", "BailingHybridConfig")
MIXERS = {
    "GLM": (GLM, {"linear_num_heads": 4, "linear_head_dim": 8}),
    "GLM without a bound": (GLM, {"linear_num_heads": 4, "linear_head_dim": 8, "linear_lower_bound": None}),
    "Ling": (LING, {"num_attention_heads": 4, "head_dim": 8}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
def test_mixers_of_other_models(name):
    """Also in 16 bits, where their convolution stays in float32."""
    kind, fields = MIXERS[name]
    before = mixer_of(kind, **fields)
    after = copy.deepcopy(before)
    assert loglinear.lift(after).lifted == ["0"]
    hidden = torch.randn(2, 70, 32, generator=torch.Generator().manual_seed(1))
    close(after[0](hidden), before[0](hidden), 1e-5)
    parts, cache = [], DynamicCache()
    with pytest.raises(TypeError, match="cache must have a linear layer at 0"):
        after[0](hidden, cache)
    for model in (before, after):
        model.bfloat16()
        model[0].conv1d.float()
        parts.append(model[0](hidden.bfloat16()))
        assert parts[-1].dtype == torch.bfloat16
    close(*(x.float() for x in parts), 2e-2)
    assert cache.get_seq_length() == 0


def test_a_cache_of_the_original_is_refused(make_family, ids):
    before = make_family("minimax")
    after = copy.deepcopy(before)
    loglinear.lift(after, num_levels=6)
    tokens = ids(1, 20)
    with torch.no_grad():
        out = before(tokens, use_cache=True)
        name = "cache" if "cache" in out else "past_key_values"
        with pytest.raises(ValueError, match="layer 1 holds the tensors of another one"):
            after(tokens[:, :1], use_cache=True, **{name: out[name]})
        cache = after(tokens, use_cache=True)[name]
    assert [type(states) for states in cache.linear_cache[1:]] == [ListedStates] * 2
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert cache.linear_cache[1].state.position.tolist() == [20, 20]
    cache.reset()
    assert cache.linear_cache[1].state is None
