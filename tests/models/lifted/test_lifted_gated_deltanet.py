"""Lifted Gated DeltaNet models of transformers: the original until they are trained, and log-linear in everything else."""

import copy

import pytest
import torch

import loglinear
from loglinear.layers import LevelScale
from loglinear.ops import fused

FAMILIES = ["qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid"]
LENGTHS = [1, 63, 64, 65, 131]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, make_family):
    """The original, and the same model lifted."""
    before = make_family(request.param)
    with torch.no_grad():
        for parameter in before.parameters():
            if parameter.dim() > 1:
                parameter *= 0.5  # or the float32 of the originals is 2e-5 away from float64
    after = copy.deepcopy(before)
    report = loglinear.lift(after, num_levels=6)  # 131 tokens have 9 levels: some share the last one's λ
    assert report.lifted == ["model.layers.0.linear_attn", "model.layers.2.linear_attn"]
    assert list(report.left) == ["model.layers.1.self_attn"]
    return before, after


@pytest.fixture
def wide(monkeypatch):
    """Every float32 in the code of the originals is float64. They run the recurrence and norms in float32 otherwise."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x.double())


def close(one, other, tolerance):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.detach().abs().max()))


def test_tensors_keep_their_names(pair):
    before, after = (model.state_dict() for model in pair)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    added = {name.partition("linear_attn.")[2] for name in after.keys() - before.keys()}
    assert added == {"level_scale.L", "level_scale.dl_proj.weight"}


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
def test_logits_in_float32(pair, length, ids):
    """Measured: 5e-6 of the largest logit apart; the originals are as far from float64."""
    tokens = ids(2, length)
    before, after = (model(tokens).logits for model in pair)
    close(after, before, 1e-5)


@torch.no_grad()
def test_logits_in_float64(pair, wide, ids):
    """Measured: 2e-14 apart. Every eps and factor is the original's."""
    before, after = (copy.deepcopy(model).double() for model in pair)
    for model in (before, after):
        model.set_experts_implementation("eager")  # the default has no float64
    tokens = ids(2, 70)
    close(after(tokens).logits, before(tokens).logits, 1e-10)


@torch.no_grad()
def test_left_padding(pair, ids):
    tokens, mask = ids(2, 70), torch.ones(2, 70, dtype=torch.long)
    mask[0, :13] = 0
    want, got = (model(tokens, attention_mask=mask).logits for model in pair)
    close(got[mask == 1], want[mask == 1], 1e-5)
    close(got[:1, 13:], pair[0](tokens[:1, 13:]).logits, 1e-5)


@torch.no_grad()
def test_a_mixer_keeps_packed_documents_apart(pair):
    """The originals take offsets, and only the kernels of flash-linear-attention read them."""
    mixer = pair[1].model.layers[0].linear_attn
    hidden = torch.randn(1, 70, 32, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 33, 70], dtype=torch.int32)
    packed = mixer(hidden, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=37, max_length_k=37)
    alone = torch.cat([mixer(hidden[:, :33]), mixer(hidden[:, 33:])], 1)
    close(packed, alone, 1e-5)


@torch.no_grad()
def test_the_kernels_of_a_step_find_their_columns(pair, monkeypatch):
    mixer = pair[1].model.layers[0].linear_attn
    hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    assert mixer.project(hidden).joined is None  # it is a copy, and only they need it
    monkeypatch.setattr(fused, "fits", lambda x: True)
    streams = mixer.project(hidden)
    parts = streams.joined.split(mixer.in_widths, dim=-1)
    for part, stream in zip(parts, (streams.conv, streams.gate, streams.rate, streams.strength), strict=True):
        assert torch.equal(part, stream)
    assert mixer.unfused() is None


def test_training_moves_the_levels(pair, ids):
    model = copy.deepcopy(pair[1]).train()
    tokens = ids(2, 100)
    before = model(tokens).logits.detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scales = [module for module in model.modules() if isinstance(module, LevelScale)]
    assert len(scales) == 2
    for step in range(10):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        assert all((x.dl_proj.weight.grad != 0).any() for x in scales)
        assert all((x.L.grad != 0).any() == (step > 0) for x in scales)  # λ moves with the projection, then with L
        optimizer.step()
    assert all(x.dl_proj.weight.abs().max() > 1e-6 for x in scales)
    after = model(tokens).logits
    assert not torch.allclose(after, before, atol=1e-2)
    for scale in scales:
        torch.nn.init.zeros_(scale.dl_proj.weight)
    assert not torch.allclose(model(tokens).logits, after, atol=1e-6)  # what has been trained is more than the rest


@torch.no_grad()
def test_a_step_is_the_whole_sequence(pair, ids):
    """Also when λ is not 1, where the original is no guide: at every position the states are those of one call."""
    model = copy.deepcopy(pair[1])
    for module in model.modules():
        if isinstance(module, LevelScale):
            torch.nn.init.normal_(module.dl_proj.weight, std=0.3)
    tokens = ids(2, 70)
    whole = model(tokens, use_cache=False).logits
    name, cache, parts = "", None, []
    for part in [tokens[:, :60], *tokens[:, 60:].split(1, dim=1)]:
        out = model(part, use_cache=True, **({} if cache is None else {name: cache}))
        name = "cache" if "cache" in out else "past_key_values"
        cache = out[name]
        parts.append(out.logits)
    close(torch.cat(parts, 1), whole, 1e-5)


def test_an_unknown_property_is_refused_and_nothing_is_changed(make_family):
    model = make_family("qwen3_5")
    model.model.layers[2].linear_attn.norm.activation = "tanh"
    with pytest.raises(ValueError, match=r"layers.2.linear_attn.*activation must be one of"):
        loglinear.lift(model)
    assert not any(isinstance(module, LevelScale) for module in model.modules())
    model.model.layers[2].linear_attn.norm = torch.nn.LayerNorm(24)
    with pytest.raises(ValueError, match=r"layers.2.linear_attn.*norm must be a gated RMSNorm"):
        loglinear.lift(model)
