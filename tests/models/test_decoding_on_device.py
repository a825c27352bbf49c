"""Decoding on a GPU: replays of one recording give the bits of eager steps, and ``generate`` the same text from both caches.

Every model is compared with itself in float64 on the CPU, or with the same kernels launched one by one. No test here
depends on the text that an untrained model makes.
"""

import copy

import pytest
import torch
from transformers import StaticCache

from loglinear.models import cache_nbytes, decoding
from loglinear.ops import fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # which says that it does not see every wait
]

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])


def wide_model(make_model, mixer, dtype=torch.bfloat16, **options):
    """Widths that every kernel takes."""
    sizes = {
        "hidden_size": 128,
        "mamba_head_dim": 32,
        "mamba_state_size": 32,
        "delta_key_dim": 32,
        "delta_value_dim": 64,
        "initializer_range": 0.1,
    }
    return make_model(mixer, **(sizes | options)).to(dtype).cuda()


def static_cache(model, ids):
    """A cache with room for 300 tokens that has read ``ids``."""
    cache = StaticCache(config=model.config, max_cache_len=300)
    model(ids, past_key_values=cache)
    return cache


def eager_steps(model, ids, cache):
    """Logits ``[B, T, vocab]`` of tokens fed one by one."""
    return torch.stack([model(column, past_key_values=cache).logits[:, -1] for column in ids.split(1, dim=1)], dim=1)


def graph_steps(step, ids):
    """The same through a DecodingGraph."""
    return torch.stack([step(column).clone() for column in ids.split(1, dim=1)], dim=1)


def same(got, want, mixer):
    """To the bit; under softmax attention to rounding: PyTorch's products may choose another kernel under recording."""
    if mixer != "attention":
        return torch.equal(got, want)
    return (got.double() - want.double()).norm() <= 0.01 * want.double().norm()


@pytest.fixture
def no_waits():
    """A function after which a wait for the device is an error, until the test ends."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def recordings(monkeypatch):
    """The list of recordings made so far."""
    made, record = [], decoding.record
    monkeypatch.setattr(decoding, "record", lambda work, device: made.append(work) or record(work, device))
    return made


@DTYPES
@torch.no_grad()
def test_the_graph_gives_the_eager_steps(make_model, tokens, mixer, dtype, no_waits, recordings):
    """The same kernels on the same buffers, through three closings of a chunk. No step waits for the device."""
    model, ids = wide_model(make_model, mixer, dtype), tokens(2, 210).cuda()
    caches = [static_cache(model, ids[:, :61]) for _ in range(2)]
    step = decoding.DecodingGraph(model, caches[0])
    first = graph_steps(step, ids[:, 61:63])  # eager, then recorded and replayed
    assert same(first, eager_steps(model, ids[:, 61:63], caches[1]), mixer)
    no_waits()
    got = graph_steps(step, ids[:, 63:])
    want = eager_steps(model, ids[:, 63:], caches[1])
    torch.cuda.set_sync_debug_mode("default")
    assert len(recordings) == 1
    assert same(got, want, mixer)
    for one, other in zip(*(cache.layers for cache in caches)):
        assert one.length == other.length == 210
        assert all(same(a, b, mixer) for a, b in zip(one.state._tensors(), other.state._tensors()))


@DTYPES
@torch.no_grad()
def test_the_graph_is_as_exact_as_one_plain_pass(make_model, tokens, mixer, dtype):
    """At most twice the error of one pass of PyTorch code at that dtype (float32: or 1e-5), both against float64."""
    model, ids = wide_model(make_model, mixer, dtype), tokens(2, 210)
    plain = copy.deepcopy(model).cpu()
    rounded = plain(ids, use_cache=False).logits[:, 61:].double()
    exact = plain.double()(ids, use_cache=False).logits[:, 61:]
    cache = static_cache(model, ids[:, :61].cuda())
    got = graph_steps(decoding.DecodingGraph(model, cache), ids[:, 61:].cuda()).cpu().double()
    allowed = max(2 * (rounded - exact).norm(), 1e-5 * exact.norm() if dtype == torch.float32 else 0)
    assert (got - exact).norm() <= allowed


@torch.no_grad()
def test_fused_kernels_give_what_plain_code_gives(make_model, tokens, mixer, monkeypatch):
    """One by one and several at once, from rows at positions of their own, in float32: they differ by rounding alone."""
    model, ids = wide_model(make_model, mixer, torch.float32), tokens(2, 90).cuda()
    mask, used, run = torch.ones_like(ids), [], fused.step_inputs
    mask[0, :7] = 0
    monkeypatch.setattr(fused, "step_inputs", lambda *args: used.append(args[0].shape[1]) or run(*args))

    def logits():
        cache = StaticCache(config=model.config, max_cache_len=300)
        model(ids[:, :60], attention_mask=mask[:, :60], past_key_values=cache)
        pieces = ids[:, 60:].split([1, 1, 3, 1, 9, 1, 14], dim=1)
        return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1).double()

    got = logits()
    assert bool(used) == (mixer != "attention")
    monkeypatch.setattr(fused, "fits", lambda x, *others: False)
    want = logits()
    assert (got - want).norm() <= 1e-5 * want.norm()


@torch.no_grad()
def test_a_recording_serves_the_next_text(make_model, tokens, mixer, recordings):
    """A reset cache that reads another prompt keeps its buffers; another number of rows has new ones."""
    model = wide_model(make_model, mixer)
    cache = static_cache(model, tokens(2, 70).cuda())
    step = decoding.DecodingGraph(model, cache)
    graph_steps(step, tokens(2, 20).cuda())
    for rows, made in ((2, 1), (1, 2)):
        ids = tokens(rows, 150).cuda()
        cache.reset()
        model(ids[:, :40], past_key_values=cache)
        got = graph_steps(step, ids[:, 40:])
        assert same(got, eager_steps(model, ids[:, 40:], static_cache(model, ids[:, :40])), mixer)
        assert len(recordings) == made


@DTYPES
def test_generate_replays(make_model, tokens, mixer, dtype, recordings):
    """Greedy texts of both caches: the same in float32; in bfloat16 until a rounding decides between two tokens."""
    model, ids = wide_model(make_model, mixer, dtype), tokens(2, 61).cuda()
    run = {"max_new_tokens": 80, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    want = model.generate(ids, **run)
    assert not recordings
    got = model.generate(ids, **run, cache_implementation="static")
    assert len(recordings) == 1
    if dtype == torch.float32:
        assert torch.equal(got.sequences, want.sequences)
    logits = [torch.stack(out.logits, dim=1).double() for out in (got, want)]  # [B, T, vocab]
    for row, differs in enumerate((got.sequences != want.sequences)[:, 61:]):
        # What led to the first difference is common to both.
        same = int(differs.nonzero()[0]) + 1 if differs.any() else 80
        one, other = (x[row, :same] for x in logits)
        assert (one - other).norm() <= (0.05 if dtype == torch.bfloat16 else 1e-4) * other.norm()


@torch.no_grad()
def test_a_padded_prompt_then_replays(make_model, tokens, mixer, recordings):
    """Rows at positions of their own, a chunked prefill, float32: the text of the eager dynamic cache."""
    model, ids = wide_model(make_model, mixer, torch.float32), tokens(2, 61).cuda()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    run = {"attention_mask": mask, "max_new_tokens": 70, "do_sample": False}
    want = model.generate(ids, **run)
    for options in ({}, {"prefill_chunk_size": 6}):
        assert torch.equal(model.generate(ids, **run, cache_implementation="static", **options), want)
    assert len(recordings) == 2


def test_nothing_is_recorded_under_autocast(make_model, tokens, mixer, recordings):
    """Its casts of the weights live no longer than itself; and a state made under it is none for the steps after it."""
    model, ids = wide_model(make_model, mixer, torch.float32), tokens(2, 61).cuda()
    run = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        want = model.generate(ids, **run)
        got = model.generate(ids, **run, cache_implementation="static")
    assert not recordings
    assert got.logits[0].isfinite().all()
    assert torch.equal(got.logits[0], want.logits[0])  # the prompt's
    with torch.no_grad():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            cache = static_cache(model, ids)
        logits = graph_steps(decoding.DecodingGraph(model, cache), tokens(2, 70).cuda())
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


@pytest.mark.parametrize("mixer", ["log_linear_mamba2", "log_linear_gated_deltanet"], indirect=True)
@torch.no_grad()
def test_room_for_a_million_tokens(make_model, tokens, mixer):
    """Entries in bfloat16, their slots for 2^20 tokens: the bits do not depend on the room, and the memory hardly does."""
    model, ids = wide_model(make_model, mixer, decoding_entry_dtype="bfloat16"), tokens(1, 200).cuda()
    got, sizes = [], []
    for room in (200, 1 << 20):
        cache = StaticCache(config=model.config, max_cache_len=room)
        model(ids[:, :50], past_key_values=cache)
        got.append(graph_steps(decoding.DecodingGraph(model, cache), ids[:, 50:]))
        sizes.append(cache_nbytes(cache))
    assert torch.equal(*got)
    assert sizes[1] < 8 * sizes[0]  # 15 slots instead of 2, and the open chunk
