"""The states of lifted mixers in the cache objects of transformers, for linear layers and layers with attention beside."""

import copy

import pytest
import torch
from transformers import DynamicCache, FalconH1Config, Mamba2Config, StaticCache

from loglinear.layers import LogLinearMamba2
from loglinear.models import cache_nbytes, restore_cache, snapshot_cache
from loglinear.models.lifted.cache import run, states_of

LAYERS = {"linear": Mamba2Config(num_hidden_layers=1), "with attention": FalconH1Config(num_hidden_layers=1)}
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=100),
}


class Mixer(LogLinearMamba2):
    layer_idx = 0
    mix = LogLinearMamba2.forward

    def forward(self, hidden, cache=None, attention_mask=None, **kwargs):  # type: ignore[override]
        return run(self, hidden, cache, attention_mask, **kwargs)


@pytest.fixture
def mixer():
    torch.manual_seed(0)
    return Mixer(16, num_heads=2, head_dim=8, state_size=8, num_levels=8).eval()


@pytest.fixture
def hidden():
    return torch.randn(2, 70, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[(layer, cache) for layer in LAYERS for cache in CACHES], ids=" ".join)
def cache(request):
    layer, kind = request.param
    return CACHES[kind](LAYERS[layer])


@torch.no_grad()
def test_parts_and_single_tokens_are_the_whole(mixer, hidden, cache):
    whole = mixer(hidden)
    parts = [hidden[:, :5], hidden[:, 5:66], *hidden[:, 66:].split(1, dim=1)]
    assert not cache.has_previous_state(0)
    compileable = cache.is_compileable
    torch.testing.assert_close(torch.cat([mixer(part, cache) for part in parts], 1), whole, rtol=1e-5, atol=1e-5)
    assert cache.has_previous_state(0)
    assert cache.is_compileable == compileable  # masks of transformers depend on it
    cache.reset()
    assert not cache.has_previous_state(0)
    torch.testing.assert_close(mixer(hidden, cache), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_in_another_order_and_copies(mixer, hidden, cache):
    mixer(hidden[:, :9], cache)
    other = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 0, 1]))
    swapped = mixer(hidden[[1, 0, 1], 9:12], cache)
    torch.testing.assert_close(swapped, mixer(hidden[:, 9:12], other)[[1, 0, 1]], rtol=0, atol=1e-7)


@torch.no_grad()
def test_rows_selected_and_repeated(mixer, hidden):
    cache = DynamicCache(config=LAYERS["with attention"])
    whole = mixer(hidden)
    mixer(hidden[:, :9], cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    torch.testing.assert_close(mixer(hidden[[1, 0], 9:], cache), whole[[1, 0], 9:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
def test_columns_taken_back(mixer, hidden, layer):
    cache = DynamicCache(config=LAYERS[layer])
    cache.activate_past_recording()
    whole = mixer(hidden)
    mixer(hidden, cache)
    if layer == "with attention":
        cache.update(torch.zeros(2, 1, 70, 4), torch.zeros(2, 1, 70, 4), 0)
    assert cache.is_croppable
    cache.crop(-7)
    assert layer == "linear" or cache.get_seq_length() == 63
    torch.testing.assert_close(mixer(hidden[:, 63:], cache), whole[:, 63:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_columns_that_cannot_be_taken_back(mixer, hidden):
    cache = DynamicCache(config=LAYERS["linear"])
    mixer(hidden, cache)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-1)


@torch.no_grad()
def test_padding_is_left_out(mixer, hidden, cache):
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    out = mixer(hidden[:, :20], cache, mask)
    mask = torch.nn.functional.pad(mask, (0, 4), value=1)
    out = torch.cat([out, mixer(hidden[:, 20:24], cache, mask)], 1)
    torch.testing.assert_close(out[:1, 6:], mixer(hidden[:1, 6:24]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[1:], mixer(hidden[1:, :24]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_packed_documents(mixer, hidden):
    row = hidden[:1]
    alone = torch.cat([mixer(row[:, :30]), mixer(row[:, 30:])], 1)
    offsets = torch.tensor([0, 30, 70])
    torch.testing.assert_close(mixer(row, cu_seq_lens_q=offsets), alone, rtol=1e-5, atol=1e-5)
    numbers = torch.tensor([[0] * 30 + [1] * 40])
    torch.testing.assert_close(mixer(row, seq_idx=numbers), alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="packed documents"):
        mixer(row, DynamicCache(config=LAYERS["linear"]), seq_idx=numbers)


def test_a_cache_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="linear layer at 0"):
        states_of(DynamicCache(), 0)
    filled = DynamicCache(config=LAYERS["linear"])
    filled.update_conv_state(torch.zeros(1, 2, 4), 0)
    with pytest.raises(ValueError, match="filled by a lifted model"):
        states_of(filled, 0)


@torch.no_grad()
def test_another_model_cannot_go_on(mixer, hidden):
    cache = DynamicCache(config=LAYERS["linear"])
    mixer(hidden, cache)
    with pytest.raises(TypeError, match="another model"):
        cache.update_conv_state(torch.zeros(2, 2, 4), 0)


@torch.no_grad()
def test_functions_for_our_own_caches_say_so(mixer, hidden, cache):
    mixer(hidden, cache)
    for function in (snapshot_cache, cache_nbytes, lambda cache: restore_cache(cache, [])):
        with pytest.raises(TypeError, match="made for a model of this package"):
            function(cache)
