"""``crop``: after it a cache is the cache that has seen only the columns before the cut, whatever was fed and how."""

import copy
import dataclasses

import pytest
import torch
from transformers import DynamicCache, StaticCache

from loglinear.layers import KVState
from loglinear.models import DecodingGraph, cache_nbytes, restore_cache, snapshot_cache
from loglinear.models.decoding import GraphedCall
from loglinear.state import LogLinearState

RECURRENT = ["log_linear_mamba2", "mamba2", "log_linear_gated_deltanet", "gated_deltanet"]


def recording(model, kind="dynamic", room=800):
    """A cache whose columns can be taken back."""
    static = kind == "static"
    cache = StaticCache(config=model.config, max_cache_len=room) if static else DynamicCache(config=model.config)
    cache.activate_past_recording()
    return cache


def feed(model, ids, cache, lengths, mask=None):
    """Logits of ``ids`` in calls of the given lengths."""
    pieces = []
    for piece in ids.split(lengths, dim=1):
        past = cache.get_seq_length()
        part = None if mask is None else mask[:, : past + piece.shape[1]]
        pieces.append(model(piece, past_key_values=cache, attention_mask=part).logits)
    return torch.cat(pieces, dim=1)


def live(state):
    """What counts of a state, as tensors."""
    state = state.ordinary()
    longest = int(state.position.max())
    if isinstance(state, KVState):
        used = torch.arange(longest) < state.position[:, None]
        return [state.position, *(x[:, :longest] * used[..., None, None] for x in (state.keys, state.values))]
    memory = state.memory
    if isinstance(memory, LogLinearState):
        slots = (longest // memory.chunk_size).bit_length()  # what is further back is room
        assert not memory.entries[:, :, slots:].any()
        memory = dataclasses.replace(memory, entries=memory.entries[:, :, :slots], decay=memory.decay[:, :, :slots])
    return [state.conv, *memory._tensors()]


def assert_same(cache, other, atol=1e-10, rtol=0):
    assert cache.get_seq_length() == other.get_seq_length()
    for layer, like in zip(cache.layers, other.layers, strict=True):
        for got, want in zip(live(layer.state), live(like.state), strict=True):
            torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_every_cut_of_a_chunk_and_more(make_model, tokens, mixer, kind):
    """Columns 56 to 131 behind a prompt and calls of several lengths; at 64 a chunk closes, at 128 two merge."""
    model, ids = make_model(mixer), tokens(2, 131)
    cache = recording(model, kind)
    feed(model, ids, cache, [50, 1, 1, 9, 1, 30, 1, 1, 1, 30, 1, 1, 1, 1, 2])
    fresh, cuts = DynamicCache(config=model.config), [1, 2, 3, 4, 6, 20, 36, 37, 66, 67, 68, 75]
    if (
        kind == "static"
    ):  # only where the state is put differs: on both sides of a merge, of a chunk's end and of a mark
        cuts = [1, 3, 4, 36, 66, 67, 75]
    feed(model, ids[:, : 131 - cuts[-1]], fresh, 131 - cuts[-1])
    for cut in reversed(cuts):
        feed(model, ids[:, fresh.get_seq_length() : 131 - cut], fresh, [131 - cut - fresh.get_seq_length()])
        cropped = copy.deepcopy(cache)
        cropped.crop(-cut)
        assert_same(cropped, fresh)
    more = tokens(2, 70)
    want = model(torch.cat([ids[:, :130], more], dim=1), use_cache=False).logits[:, 130:]
    torch.testing.assert_close(feed(model, more, cropped, [1, 2, 64, 3]), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "side"), [("dynamic", "left"), ("dynamic", "right"), ("static", "holes")])
@torch.no_grad()
def test_columns_of_padding_are_taken_back_as_columns(make_model, tokens, mixer, kind, side):
    """Three rows at positions of their own; a cut goes through padding, and what follows is padded again."""
    model, ids, mask = make_model(mixer), tokens(3, 90), torch.ones(3, 90, dtype=torch.long)
    if side == "left":
        mask[0, :66], mask[2, :30] = 0, 0
    elif side == "right":
        mask[0, 20:70], mask[2, 55:70], mask[1, 80:] = 0, 0, 0
    else:
        mask[0, 3:90:2], mask[1, [64, 65, 89]], mask[2, 60:75] = 0, 0, 0
    cache, lengths = recording(model, kind), [70, 1, 4, 1, 14]
    feed(model, ids, cache, lengths, mask)
    for kept in (88, 75, 74, 69, 41):
        cache.crop(kept - cache.get_seq_length())
        fresh = DynamicCache(config=model.config)
        feed(model, ids[:, :kept], fresh, kept, mask)
        assert_same(cache, fresh)
    again = torch.cat([mask[:, :41], mask[:, 41:].roll(1, 0)], dim=1)
    feed(model, ids[:, 41:], cache, [10, 39], again)
    cache.crop(-20)
    fresh = DynamicCache(config=model.config)
    got = feed(model, ids[:, 70:], cache, [20], again)
    torch.testing.assert_close(got, feed(model, ids, fresh, [70, 20], again)[:, 70:], rtol=0, atol=1e-10)


@pytest.mark.default_packages
@torch.no_grad()
def test_speculation(make_model, tokens, mixer):
    """Drafts of which a part is right, past the fourth chunk's end: the logits are those of one pass."""
    model, ids = make_model(mixer), tokens(2, 240)
    want, cache = model(ids, use_cache=False).logits, recording(model)
    generator = torch.Generator().manual_seed(0)
    past, step = 0, 120
    while past < 200:
        right = int(torch.randint(1, step + 1, (), generator=generator))
        draft = torch.cat([ids[:, past : past + right], tokens(2, step - right)], dim=1)
        got = feed(model, draft, cache, [step] if past % 3 else [step // 2, *[1] * (step - step // 2)])
        torch.testing.assert_close(got[:, :right], want[:, past : past + right], rtol=0, atol=1e-10)
        past, step = past + right, int(torch.randint(1, 36, (), generator=generator))
        cache.crop(past - cache.get_seq_length())


@pytest.mark.default_packages
@torch.no_grad()
def test_float32(make_model, tokens, mixer):
    model, ids = make_model(mixer).float(), tokens(1, 140)
    cache, fresh = recording(model), DynamicCache(config=model.config)
    feed(model, ids, cache, [60, 1, 1, 70, 1, 7])
    cache.crop(-60)
    feed(model, ids[:, :80], fresh, [60, 1, 1, 18])
    assert_same(cache, fresh, atol=1e-5, rtol=1e-5)


@pytest.mark.default_packages
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_long_call_keeps_four_chunks(make_model, tokens, mixer, padded):
    model, ids = make_model(mixer), tokens(2, 408)
    mask = torch.ones(2, 408, dtype=torch.long)
    if padded:
        mask[0, :208], mask[1, 398:] = 0, 0
    cache, fresh = recording(model), DynamicCache(config=model.config)
    got = feed(model, ids, cache, [408], mask)
    want = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    cache.crop(-1)
    if mixer != "attention":
        with pytest.raises(ValueError, match=r"tokens_to_remove must be in \[-255, 0\], .* kept: got -256"):
            cache.crop(-256)
    cache.crop(-255)
    feed(model, ids[:, :152], fresh, [152], mask)
    assert_same(cache, fresh, atol=1e-9)


@pytest.mark.parametrize("mixer", [*RECURRENT, ["mamba2", "attention", "log_linear_gated_deltanet"]], indirect=True)
@torch.no_grad()
def test_nothing_is_kept_unless_asked_for(make_model, tokens, mixer):
    model, ids = make_model(mixer), tokens(1, 70)
    cache = model(ids).past_key_values
    plain = cache_nbytes(cache)
    assert not cache.is_croppable
    cache.crop(0)
    with pytest.raises(ValueError, match=r"got -3; call cache.activate_past_recording\(\) before"):
        cache.crop(-3)
    cache.activate_past_recording()
    assert cache.is_croppable
    with pytest.raises(ValueError, match=r"tokens_to_remove must be in \[0, 0\], .*: got -3"):
        cache.crop(-3)
    model(ids[:, :5], past_key_values=cache)
    with pytest.raises(ValueError, match=r"tokens_to_remove must be in \[-5, 0\], .*: got 1"):
        cache.crop(1)
    cache.crop(-5)
    fresh = DynamicCache(config=model.config)
    feed(model, ids, fresh, [70])
    assert_same(cache, fresh)
    assert cache_nbytes(cache) > plain
    for layer in cache.layers:
        if hasattr(layer, "record_past"):  # as ``generate`` does when it is done
            layer.record_past = False
    assert cache_nbytes(cache) == plain


@pytest.mark.default_packages
@torch.no_grad()
def test_memory_is_bounded(make_model, tokens):
    """At most three states and ten chunks of inputs, however long the text and whatever the calls."""
    model = make_model("log_linear_mamba2", num_hidden_layers=1)
    plain = DynamicCache(config=model.config)
    feed(model, tokens(1, 300), plain, [300])
    for lengths in ([1] * 330, [9] * 60, [255, 127, 129, 3, 256] * 2, [1000]):
        cache = recording(model)
        ids = tokens(1, sum(lengths))
        for piece in ids.split(lengths, dim=1):
            model(piece, past_key_values=cache)
            journal = cache.layers[0]._journal
            assert len(journal.marks) <= 3
            assert cache_nbytes(cache) <= 4 * cache_nbytes(plain) + 640 * model.config.hidden_size * 8
            inputs = sum(piece.nbytes for mark in journal.marks for piece in mark.pieces)
            assert inputs <= 640 * model.config.hidden_size * 8
            assert journal.reach(cache.get_seq_length()) >= min(256, cache.get_seq_length())


@torch.no_grad()
def test_rows_are_chosen_with_their_past(make_model, tokens, mixer):
    model, ids = make_model(mixer), tokens(3, 80)
    mask = torch.ones(3, 80, dtype=torch.long)
    mask[0, :9], mask[1, 70:75] = 0, 0
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0], dtype=torch.int32)), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache, fresh = recording(model), DynamicCache(config=model.config)
        feed(model, ids, cache, [60, 1, 12, 7], mask)
        change(cache)
        cache.crop(-9)
        feed(model, ids[rows, :71], fresh, [71], mask[rows])
        assert_same(cache, fresh)


@torch.no_grad()
def test_reset_and_restore_forget_what_was_recorded(make_model, tokens, mixer):
    model, ids, kept = make_model(mixer), tokens(2, 80), mixer == "attention"
    mask = torch.ones(2, 80, dtype=torch.long)
    mask[0, 60:72] = 0
    cache, fresh = recording(model), DynamicCache(config=model.config)
    feed(model, ids[:, :73], cache, [70, 3], mask)
    saved = snapshot_cache(cache)
    feed(model, ids[:, 73:78], cache, [5], mask)
    restore_cache(cache, saved)
    if not kept:
        with pytest.raises(ValueError, match=r"must be in \[0, 0\]"):
            cache.crop(-1)
    feed(model, ids[:, 73:], cache, [7], mask)
    cache.crop(-7 - 10 * kept)
    feed(model, ids[:, : 73 - 10 * kept], fresh, [73 - 10 * kept], mask)
    assert_same(cache, fresh)
    cache.reset()
    with pytest.raises(ValueError, match=r"must be in \[0, 0\]"):
        cache.crop(-1)
    feed(model, ids, cache, [80])
    cache.crop(-20)
    again = DynamicCache(config=model.config)
    feed(model, ids[:, :60], again, [60])
    assert_same(cache, again)


@pytest.mark.default_packages
@torch.no_grad()
def test_a_copy_shares_nothing_but_the_model(make_model, tokens, mixer):
    model, ids = make_model(mixer), tokens(2, 80)
    cache = recording(model)
    feed(model, ids, cache, [70, 10])
    other = copy.deepcopy(cache)
    other.crop(-30)
    feed(model, tokens(2, 40), other, [40])
    cache.crop(-15)
    fresh = DynamicCache(config=model.config)
    feed(model, ids[:, :65], fresh, [65])
    assert_same(cache, fresh)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_recorded_in_inference_mode(make_model, tokens, mixer, kind):
    """What is made there cannot be written into outside."""
    model, ids = make_model(mixer), tokens(2, 80)
    cache, fresh = recording(model, kind), DynamicCache(config=model.config)
    with torch.inference_mode():
        feed(model, ids, cache, [70, 10])
    cache.crop(-9)
    with torch.no_grad():
        feed(model, ids[:, :71], fresh, [71])
        assert_same(cache, fresh)
        feed(model, ids[:, 71:], cache, [9])
    with torch.inference_mode():
        cache.crop(-9)
        feed(model, ids[:, 71:], cache, [4, 5])


@pytest.mark.default_packages
def test_recorded_under_autograd(make_model, tokens, mixer):
    """Gradients flow through what was kept."""
    model, ids = make_model(mixer), tokens(2, 80)
    model(ids[:, :75], use_cache=False).logits[:, 71:].sum().backward()
    want = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    cache = recording(model)
    feed(model, ids, cache, [70, 10])
    cache.crop(-9)
    feed(model, ids[:, 71:75], cache, [4]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.default_packages
@torch.no_grad()
def test_recorded_under_autocast(make_model, tokens, mixer):
    """The cut is made outside of it, and computes as the call did."""
    model, ids = make_model(mixer).float(), tokens(1, 80)
    cache, fresh = recording(model), DynamicCache(config=model.config)
    with torch.autocast("cpu", torch.bfloat16):
        feed(model, ids[:, :74], cache, [64, 10])
        feed(model, ids[:, :70], fresh, [64, 6])
    cache.crop(-4)
    # Softmax attention of ten tokens and of six may differ in the last bit of a bfloat16 of up to 4: 2^-6.
    assert_same(cache, fresh, atol=2**-6 if mixer == "attention" else 1e-6)


@pytest.mark.default_packages
@torch.no_grad()
def test_no_graph_passes_by_the_record(make_model, tokens, mixer):
    """Where columns are recorded, ``generate`` and ``DecodingGraph`` call the model itself."""
    model, ids = make_model(mixer), tokens(1, 20)
    cache = StaticCache(config=model.config, max_cache_len=40)
    feed(model, ids[:, :8], cache, [8])
    step = DecodingGraph(model, cache)
    cache.activate_past_recording()
    for t in range(8, 12):
        step(ids[:, t : t + 1])
    cache.crop(-3)
    fresh = DynamicCache(config=model.config)
    feed(model, ids[:, :9], fresh, [9])
    assert_same(cache, fresh)
    if mixer != "attention":
        assert not cache.is_compileable
        assert not GraphedCall(model)._serves(ids[:, :1], cache, {})
        with pytest.raises(ValueError, match=r"must be a StaticCache, .* must not record its past"):
            DecodingGraph(model, cache)


@torch.no_grad()
def test_a_cache_outlives_its_model(make_model, tokens):
    model = make_model("mamba2")
    cache, config = recording(model), model.config
    feed(model, tokens(1, 20), cache, [20])
    del model
    with pytest.raises(RuntimeError, match="crop needs the model that has read the columns"):
        cache.crop(-1)
    assert config is not None


@torch.no_grad()
def test_a_torn_cache_is_refused(make_model, tokens):
    """The attention layer could take back what the other cannot: the layers no longer agree."""
    model = make_model(["attention", "mamba2"], num_hidden_layers=2)
    cache = recording(model)
    feed(model, tokens(1, 600), cache, [600])
    with pytest.raises(ValueError, match=r"tokens_to_remove must be in \[-256, 0\]"):
        cache.crop(-300)
    with pytest.raises(ValueError, match=r"as many columns in every layer: got \[300, 600\].* reset the cache"):
        model(tokens(1, 1), past_key_values=cache)
