"""Cache layers: what transformers asks of them, and caches that were not made for this model."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from loglinear.models import MIXERS, cache_nbytes

alone = pytest.mark.parametrize("mixer", MIXERS, indirect=True)


@pytest.fixture
def filled(make_model, tokens, mixer):
    """A model, three texts, and a cache that has read them."""
    model, ids = make_model(mixer), tokens(3, 70)
    with torch.no_grad():
        return model, ids, model(ids).past_key_values


@torch.no_grad()
def check_rows(model, ids, cache, rows):
    """The cache must go on as if it had read ``ids[rows]``."""
    more = torch.arange(3, 8).expand(len(rows), -1)
    want = model(torch.cat([ids[rows], more], dim=1)).logits[:, -5:]
    torch.testing.assert_close(model(more, past_key_values=cache).logits, want, rtol=0, atol=1e-9)


def test_reorder(filled):
    model, ids, cache = filled
    cache.reorder_cache(torch.tensor([2, 0, 0], dtype=torch.int32))
    check_rows(model, ids, cache, [2, 0, 0])


def test_select(filled):
    model, ids, cache = filled
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.batch_size == 1
    check_rows(model, ids, cache, [1])


def test_repeat(filled):
    model, ids, cache = filled
    cache.batch_repeat_interleave(2)
    check_rows(model, ids, cache, [0, 0, 1, 1, 2, 2])


def test_reset(filled):
    model, ids, cache = filled
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache_nbytes(cache) == 0
    with torch.no_grad():
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


@pytest.mark.default_packages
@alone
def test_bytes_are_those_of_the_tensors(filled, mixer):
    """Room for tokens to come is counted. Keys and values grow by a quarter at once, log-linear states by doublings."""
    model, ids, cache = filled
    with torch.no_grad():
        longer = model(ids.repeat(1, 8)).past_key_values
        double = model(ids.repeat(1, 16)).past_key_values
    sizes = [cache_nbytes(one) for one in (cache, longer, double)]
    rows, heads, width = 3, 2, 6
    if mixer == "attention":
        room = torch.tensor([70 + 256, 560 + 256, 1400])
        assert sizes == (len(cache.layers) * (2 * 8 * rows * room * heads * width + 8 * rows)).tolist()
    else:
        assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.default_packages
@alone
@torch.no_grad()
def test_bytes_by_the_room_of_a_static_cache(make_model, tokens, mixer):
    """Per doubling of the context: nothing for linear models, one entry a head and layer for log-linear ones."""
    model, ids = make_model(mixer), tokens(3, 5)
    sizes = []
    for room in (1 << 12, 1 << 13, 1 << 14):
        cache = StaticCache(config=model.config, max_cache_len=room)
        model(ids, past_key_values=cache)
        sizes.append(cache_nbytes(cache))
    growth = [sizes[1] - sizes[0], sizes[2] - sizes[1]]
    entry = {"log_linear_mamba2": 4 * (6 * 12 + 2), "log_linear_gated_deltanet": 4 * 6 * 8}  # heads · (K V + two logs)
    if mixer == "attention":
        assert growth[1] == 2 * growth[0] > 0
    elif mixer in entry:
        assert growth == [len(cache.layers) * 3 * 8 * entry[mixer]] * 2
    elif MIXERS[mixer].twin is None:
        assert growth == [0, 0]


@torch.no_grad()
def test_foreign_caches_are_refused(make_model, tokens, mixer):
    model, ids = make_model(mixer), tokens(1, 4)
    for cache in (DynamicCache(), DynamicCache(config=make_model(mixer).config)):
        cache.layers = cache.layers[:1]
        with pytest.raises(TypeError, match=r"made for this model, with DynamicCache\(config=model.config\)"):
            model(ids, past_key_values=cache)
    with pytest.raises(TypeError, match=r"made for this model.*got \(\)"):
        model(ids, past_key_values=())
    other = make_model("mamba2" if mixer == "attention" else ["attention"] * len(mixer))
    with pytest.raises(TypeError, match="made for this model"):
        model(ids, past_key_values=DynamicCache(config=other.config))
    layer = StaticCache(config=model.config, max_cache_len=8).layers[0]
    with pytest.raises(TypeError, match="holds whole mixer states"):
        layer.update(torch.zeros(1), torch.zeros(1))


@torch.no_grad()
@pytest.mark.parametrize("linear", ["mamba2", "gated_deltanet"])
def test_a_cache_of_the_linear_twin_is_refused(make_model, tokens, linear):
    cache = make_model(linear)(tokens(1, 4)).past_key_values
    for length in (1, 2):
        with pytest.raises(TypeError, match="must be a LogLinearState with level_scales: got LinearState"):
            make_model("log_linear_" + linear)(tokens(1, length), past_key_values=cache)
