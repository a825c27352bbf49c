"""Decoding in place: every cache, mixer and way to feed tokens gives the logits of one pass, from buffers that stay put."""

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import loglinear
from loglinear.layers import recurrence
from loglinear.models import MIXERS, cache_nbytes, decoding, restore_cache, snapshot_cache
from loglinear.models.cache import MixerCacheLayer

STEPS = 9


def make_cache(kind, model, room=300):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=room)
    return DynamicCache(config=model.config)


def feed(model, ids, cache, lengths):
    """Logits of ``ids`` in calls of the given lengths, the last repeated until all is read."""
    pieces, start = [], 0
    for count in [*lengths, *[lengths[-1]] * ids.shape[1]]:
        if start < ids.shape[1]:
            pieces.append(model(ids[:, start : start + count], past_key_values=cache).logits)
            start += count
    return torch.cat(pieces, dim=1)


def addresses(cache):
    return [tensor.data_ptr() for layer in cache.layers for tensor in layer.state._tensors()]


@pytest.fixture
def steps_only(monkeypatch):
    """A function after which no call may go through the ordinary ops."""

    def forbid():
        def ordinary(*args):
            raise AssertionError("a single token went through the ordinary op")

        monkeypatch.setattr(recurrence, "_ordinary", ordinary)

    return forbid


@pytest.mark.parametrize(
    ("prefill", "kind", "steps"),
    [
        (65, "dynamic", 70),
        (126, "static", STEPS),
        pytest.param(1, "dynamic", 70, marks=pytest.mark.default_packages),
        pytest.param(63, "dynamic", STEPS, marks=pytest.mark.default_packages),
        pytest.param(64, "static", 70, marks=pytest.mark.default_packages),
    ],
)
@torch.no_grad()
def test_steps_equal_one_pass(make_model, tokens, mixer, prefill, kind, steps, steps_only):
    """Over the end of a chunk, soon or after a chunk of steps."""
    model, ids = make_model(mixer), tokens(2, prefill + steps)
    want, cache = model(ids, use_cache=False).logits, make_cache(kind, model)
    first = model(ids[:, :prefill], past_key_values=cache).logits
    where = addresses(cache)
    steps_only()
    rest = feed(model, ids[:, prefill:], cache, [1])
    torch.testing.assert_close(torch.cat([first, rest], dim=1), want, rtol=0, atol=1e-10)
    assert addresses(cache) == where
    assert cache.get_seq_length() == prefill + steps


@pytest.mark.default_packages
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_calls_of_any_length(make_model, tokens, mixer, kind):
    """One, two and three tokens, a chunk, more than a chunk, in any order."""
    model, ids = make_model(mixer), tokens(2, 290)
    cache, want = make_cache(kind, model), model(ids, use_cache=False).logits
    got = feed(model, ids, cache, [5, 1, 2, 3, 64, 1, 65, 3, 64, 2, 70, 1])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.default_packages
@torch.no_grad()
def test_float32(make_model, tokens, mixer):
    model, ids = make_model(mixer).float(), tokens(1, 130)
    got = feed(model, ids, make_cache("static", model), [60, *[1] * 6, 55, 1])
    want = model.double()(ids, use_cache=False).logits
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_rows_with_left_padding(make_model, tokens, mixer, kind, steps_only):
    """Rows of 5, 126 and 58 tokens, each at its own position; then one token each, and two rows close a chunk."""
    model, lengths = make_model(mixer), [5, 126, 58]
    more = tokens(3, STEPS)
    rows, ids, mask = [], torch.full((3, 126), 7), torch.zeros(3, 126, dtype=torch.long)
    for i, length in enumerate(lengths):
        rows.append(tokens(1, length))
        ids[i, 126 - length :], mask[i, 126 - length :] = rows[i][0], 1
    wholes = [torch.cat([row, more[i : i + 1]], dim=1) for i, row in enumerate(rows)]
    want = torch.cat([model(whole, use_cache=False).logits[:, -STEPS:] for whole in wholes])
    cache = make_cache(kind, model)
    model(ids, attention_mask=mask, past_key_values=cache)
    steps_only()
    got = []
    for t in range(STEPS):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
        got.append(model(more[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=0, atol=1e-10)


@pytest.mark.default_packages
@torch.no_grad()
def test_a_row_that_pauses(make_model, tokens, mixer):
    """Masked single columns in the middle: those rows stand still, the buffers stay where they are."""
    model, ids = make_model(mixer), tokens(2, 75)
    cache = make_cache("static", model)
    mask = torch.ones(2, 75, dtype=torch.long)
    mask[0, 62:66], mask[1, 70] = 0, 0
    pieces = [model(ids[:, :58], attention_mask=mask[:, :58], past_key_values=cache).logits]
    where = addresses(cache)
    for t in range(58, 75):
        pieces.append(model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits)
        assert addresses(cache) == where
    for i in range(2):
        real = mask[i].bool()
        want = model(ids[i, real].unsqueeze(0), use_cache=False).logits[0]
        torch.testing.assert_close(torch.cat(pieces, dim=1)[i, real], want, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_dynamic_cache_makes_room(make_model, tokens, mixer, monkeypatch):
    """From one slot, and room for few keys, to all that 290 tokens need."""
    for kind in [MixerCacheLayer, *MixerCacheLayer.__subclasses__()]:
        monkeypatch.setattr(kind, "_room", lambda self, tokens: tokens + 3)
    model, ids = make_model(mixer), tokens(2, 290)
    cache = make_cache("dynamic", model)
    got, grown = feed(model, ids[:, :40], cache, [5, 1]), cache_nbytes(cache)
    got = torch.cat([got, feed(model, ids[:, 40:], cache, [1, 40, 3, 190, 1])], dim=1)
    torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=0, atol=1e-10)
    growing = [name for name in model.config.layer_mixers if name == "attention" or MIXERS[name].twin]
    assert (cache_nbytes(cache) > grown) == bool(growing)


@torch.no_grad()
def test_a_static_cache_keeps_its_buffers(make_model, tokens, mixer):
    """Through steps, long calls, padding, beams, a reset and the next text; and each of them gives the right logits."""
    model, ids = make_model(mixer), tokens(2, 200)
    cache = make_cache("static", model)
    model(ids[:, :70], past_key_values=cache)
    where, size = addresses(cache), cache_nbytes(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    want = model(ids.flip(0), use_cache=False).logits
    got = feed(model, ids.flip(0)[:, 70:], cache, [1, 65, 2, 1, 1, 60])
    torch.testing.assert_close(got, want[:, 70:], rtol=0, atol=1e-10)
    assert addresses(cache) == where
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache_nbytes(cache) == size
    torch.testing.assert_close(feed(model, ids, cache, [3, 1, 57, *[1] * 6, 125, 1]), want.flip(0), rtol=0, atol=1e-10)
    assert addresses(cache) == where
    cache.reset()
    got = feed(model, ids[:1, :70], cache, [66, 1])  # another number of rows needs other buffers
    torch.testing.assert_close(got, want[1:, :70], rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_full_static_cache_is_named_before_anything_is_written(make_model, tokens, mixer):
    model, ids = make_model(mixer), tokens(1, 70)
    cache = make_cache("static", model, room=69)
    with pytest.raises(ValueError, match=r"max_cache_len must be at least 70.*got 69"):
        model(ids, past_key_values=cache)
    got = feed(model, ids[:, :69], cache, [60, 1])
    before = snapshot_cache(cache)
    with pytest.raises(ValueError, match="max_cache_len must be at least 70"):
        model(ids[:, 69:], past_key_values=cache)
    for layer, saved in zip(cache.layers, before):
        assert all(torch.equal(a, b) for a, b in zip(layer.state._tensors(), saved.state._tensors()))
    torch.testing.assert_close(got, model(ids[:, :69], use_cache=False).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_tokens_are_taken_back(make_model, tokens, mixer, kind):
    """Speculation: guess across the border of a chunk, return, go on otherwise; several times from one snapshot."""
    model, ids, guess = make_model(mixer), tokens(2, 75), tokens(2, 9)
    want = model(ids, use_cache=False).logits
    cache = make_cache(kind, model)
    empty = snapshot_cache(cache)
    feed(model, ids[:, :61], cache, [60, 1])
    where, saved = addresses(cache), snapshot_cache(cache)
    for lengths in ([1], [9], [2]):
        wrong = feed(model, guess, cache, lengths)
        assert not torch.allclose(wrong, want[:, 61:70])
        restore_cache(cache, saved)
        assert cache.get_seq_length() == 61
        assert addresses(cache) == where
    torch.testing.assert_close(feed(model, ids[:, 61:], cache, [1]), want[:, 61:], rtol=0, atol=1e-10)
    restore_cache(cache, empty)
    torch.testing.assert_close(feed(model, ids, cache, [5, 1, 55, 1]), want, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=rf"snapshot must be of a cache of {len(saved)} layers: got 1"):
        restore_cache(cache, saved[:1])


@pytest.mark.default_packages
@torch.no_grad()
def test_a_copy_shares_nothing(make_model, tokens, mixer):
    model, ids = make_model(mixer), tokens(2, 80)
    cache = make_cache("static", model)
    model(ids[:, :70], past_key_values=cache)
    other = copy.deepcopy(cache)
    feed(model, tokens(2, 10), other, [1])
    want = model(ids, use_cache=False).logits[:, 70:]
    torch.testing.assert_close(feed(model, ids[:, 70:], cache, [1]), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_prompt_read_in_inference_mode(make_model, tokens, mixer, kind):
    """What is made there cannot be written into outside, where ``generate`` works."""
    model, ids = make_model(mixer), tokens(2, 80)
    cache = make_cache(kind, model)
    with torch.inference_mode():
        want = model(ids).logits
        model(ids[:, :70], past_key_values=cache)
        saved = snapshot_cache(cache)
    with torch.no_grad():
        restore_cache(cache, saved)
        cache.reorder_cache(torch.tensor([0, 1]))
        got = feed(model, ids[:, 70:], cache, [1, 9])
    torch.testing.assert_close(got, want[:, 70:], rtol=0, atol=1e-10)
    with torch.inference_mode():
        restore_cache(cache, saved)
    with torch.no_grad():
        torch.testing.assert_close(feed(model, ids[:, 70:], cache, [10]), want[:, 70:], rtol=0, atol=1e-10)


@pytest.mark.default_packages
def test_under_autograd_calls_are_functional(make_model, tokens, mixer):
    """A cache from decoding, gone on with gradients: the buffers are left alone, and decoding may follow again."""
    model, ids = make_model(mixer), tokens(2, 80)
    cache = make_cache("static", model)
    with torch.no_grad():
        model(ids[:, :70], past_key_values=cache)
    buffers = [layer.state for layer in cache.layers]
    before = snapshot_cache(cache)
    out = model(ids[:, 70:75], past_key_values=cache).logits
    out.sum().backward()
    for state, saved in zip(buffers, before):
        assert all(torch.equal(a, b) for a, b in zip(state._tensors(), saved.state._tensors()))
    with torch.no_grad():
        rest = feed(model, ids[:, 75:], cache, [1])
        want = model(ids, use_cache=False).logits[:, 70:]
    torch.testing.assert_close(torch.cat([out.detach(), rest], dim=1), want, rtol=0, atol=1e-10)


@pytest.mark.default_packages
@pytest.mark.parametrize("mixer", ["log_linear_mamba2", "log_linear_gated_deltanet"], indirect=True)
@torch.no_grad()
def test_entries_in_bfloat16(make_model, tokens, mixer):
    """Half the memory of the entries, and logits within a few roundings of 2^-9."""
    sizes, got, ids = [], [], tokens(1, 200)
    for dtype in ("float32", "bfloat16"):
        model = make_model(mixer, decoding_entry_dtype=dtype).float()
        cache = make_cache("static", model, room=1 << 20)
        got.append(feed(model, ids, cache, [180, 1]))
        sizes.append(cache_nbytes(cache))
    assert sizes[1] < sizes[0]
    assert 0 < (got[1] - got[0]).norm() / got[0].norm() < 0.01


# ---------------------------------------------------------------------------------------------------- the CUDA graph


@pytest.fixture
def fake_graphs(monkeypatch):
    """``fake_graphs(cache)`` lets DecodingGraph record on the CPU; it returns the list of recordings made."""
    made = []

    def install(cache):
        monkeypatch.setattr(decoding, "captured_by_graphs", lambda state, dtype: True)
        monkeypatch.setattr(decoding, "on_side_stream", lambda work, device: work())
        monkeypatch.setattr(decoding, "record", lambda work, device: record(work, cache))
        return made

    def record(work, cache):
        """Replaying runs the work once more, but for what Python counts, and writes its fixed result."""
        saved = snapshot_cache(cache)
        result = work().clone()
        length = cache.get_seq_length()
        restore_cache(cache, saved)  # recording runs nothing on the device
        for layer in cache.layers:
            layer.length = length
        made.append(result)

        def replay():
            for layer in cache.layers:
                layer.length -= 1  # which the work counts again
            result.copy_(work())

        return replay, result

    return install


@pytest.mark.default_packages
@pytest.mark.parametrize("graphs", [True, False], ids=["recorded", "eager"])
@torch.no_grad()
def test_graph_steps_equal_one_pass(make_model, tokens, mixer, request, graphs):
    model, ids = make_model(mixer), tokens(2, 140)
    want, cache = model(ids, use_cache=False).logits, make_cache("static", model, room=140)
    made = request.getfixturevalue("fake_graphs")(cache) if graphs else []
    step = decoding.DecodingGraph(model, cache)
    with pytest.raises(ValueError, match="cache must have read a prompt"):
        step(ids[:, :1])
    model(ids[:, :121], past_key_values=cache)
    for t in range(121, 140):
        torch.testing.assert_close(step(ids[:, t : t + 1]), want[:, t], rtol=0, atol=1e-10)
        assert cache.get_seq_length() == t + 1
    assert len(made) == graphs
    with pytest.raises(ValueError, match="max_cache_len must be at least 141"):
        step(ids[:, :1])
    with pytest.raises(ValueError, match=r"input_ids must have shape \[B, 1\]: got \[2, 2\]"):
        step(ids[:, :2])


@pytest.mark.default_packages
def test_a_graph_after_a_prompt_under_autograd(make_model, tokens, mixer, fake_graphs):
    """The first step goes on from an ordinary state; only what runs on the buffers is recorded."""
    model, ids = make_model(mixer), tokens(2, 90)
    cache = make_cache("static", model)
    made = fake_graphs(cache)
    model(ids[:, :60], past_key_values=cache)
    step = decoding.DecodingGraph(model, cache)
    got = []
    for t in range(60, 90):
        got.append(step(ids[:, t : t + 1]).clone())
        assert len(made) == (t >= 62)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits[:, 60:]
    torch.testing.assert_close(torch.stack(got, dim=1), want, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="cache must be a StaticCache"):
        decoding.DecodingGraph(model, make_cache("dynamic", model))


@pytest.mark.default_packages
@torch.no_grad()
def test_a_graph_is_recorded_anew_for_new_buffers(make_model, tokens, fake_graphs):
    model, ids = make_model("log_linear_mamba2"), tokens(2, 100)
    cache = make_cache("static", model)
    made = fake_graphs(cache)
    step = decoding.DecodingGraph(model, cache)
    for rows, recordings in ((slice(0, 2), 1), (slice(0, 2), 1), (slice(0, 1), 2)):
        cache.reset()
        model(ids[rows, :90], past_key_values=cache)
        for t in range(90, 100):
            got = step(ids[rows, t : t + 1])
        torch.testing.assert_close(got, model(ids[rows], use_cache=False).logits[:, -1], rtol=0, atol=1e-10)
        assert len(made) == recordings


@pytest.mark.default_packages
def test_a_graph_goes_on_outside_of_inference_mode(make_model, tokens, fake_graphs):
    model, ids = make_model(["log_linear_mamba2", "attention", "mamba2"]), tokens(2, 80)
    cache = make_cache("static", model)
    made = fake_graphs(cache)
    step = decoding.DecodingGraph(model, cache)
    with torch.inference_mode():
        want = model(ids).logits
        model(ids[:, :60], past_key_values=cache)
        for t in range(60, 64):
            step(ids[:, t : t + 1])
    for t in range(64, 80):
        torch.testing.assert_close(step(ids[:, t : t + 1]), want[:, t], rtol=0, atol=1e-10)
    assert len(made) == 2


def test_generate_replays(make_model, tokens, mixer, fake_graphs, monkeypatch):
    """What ``generate`` does on CUDA with a static cache; padding in the prompt and a chunked prefill included."""
    model, ids = make_model(mixer), tokens(2, 61)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda self, kwargs, config: True)
    run = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    want = model.generate(ids, **run, use_cache=False)
    for recordings, options in enumerate(({}, {"prefill_chunk_size": 6}), start=1):
        cache = make_cache("static", model)
        made = fake_graphs(cache)
        assert torch.equal(model.generate(ids, **run, past_key_values=cache, **options), want)
        assert len(made) == recordings


def test_the_example_of_the_readme(make_model, tokens):
    """Its prompt is read under autograd, so that the first step goes on from an ordinary state."""
    (block,) = re.findall(r"^```py\n(.*?)^```$", (Path(__file__).parents[2] / "README.md").read_text(), re.M | re.S)
    model, ids = make_model("log_linear_mamba2"), tokens(1, 15)
    names = {"transformers": transformers, "loglinear": loglinear, "model": model, "tokens": ids}
    exec(block, names)
    text = model.generate(ids, max_new_tokens=100, do_sample=False, use_cache=False)
    with torch.no_grad():
        want = model(text, use_cache=False).logits[:, -1]
    assert names["cache"].get_seq_length() == 115
    torch.testing.assert_close(names["logits"], want, rtol=0, atol=1e-10)
