"""Every recurrent mixer against its definition written out token by token, and every mixer against itself in pieces."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from loglinear.fenwick import level
from loglinear.layers import (
    LogLinearGatedDeltaNet,
    LogLinearGLA,
    LogLinearKDA,
    LogLinearMamba2,
    LogLinearRetention,
    SoftmaxAttention,
)

HIDDEN = 12
LINEAR = ["mamba2", "gated_deltanet", "gla", "kda", "retnet", "lightning"]
RECURRENT = [name for linear in LINEAR for name in (f"log_linear_{linear}", linear)]
MIXERS = [*RECURRENT, "attention"]
# Those that differ to states and packing. Fixed decays do not, except for the positions that RetNet reads.
PIECES = [name for name in MIXERS if "lightning" not in name and name != "retnet"]


def make(name, **overrides):
    torch.manual_seed(0)
    if name == "attention":
        return SoftmaxAttention(HIDDEN, num_heads=4, head_dim=6, num_kv_heads=2).double()
    common = {"num_levels": 6, "log_linear": name.startswith("log_linear")} | overrides
    linear = name.removeprefix("log_linear_")
    if linear == "mamba2":
        mixer = LogLinearMamba2(HIDDEN, num_heads=4, head_dim=3, state_size=5, num_groups=2, **common)
    elif linear == "gated_deltanet":
        mixer = LogLinearGatedDeltaNet(HIDDEN, num_heads=4, key_dim=5, value_dim=3, num_key_heads=2, **common)
    elif linear == "kda":
        mixer = LogLinearKDA(HIDDEN, 4, 5, 3, num_key_heads=2, **common)
    elif linear == "gla":
        mixer = LogLinearGLA(HIDDEN, 4, 5, 3, num_kv_heads=2, decay_rank=2, decay_normalizer=0.5, **common)
    elif linear == "retnet":
        mixer = LogLinearRetention(HIDDEN, 4, 6, 3, num_kv_heads=2, **common)
    else:
        lightning = {"decays": "slopes", "decay_factor": 0.5, "rotary_base": None, "conv_activation": "silu"}
        lightning |= {"gate_activation": "sigmoid", "norm_per_head": False}
        mixer = LogLinearRetention(HIDDEN, 4, 3, 3, **lightning, **common)
    return mixer.double()


def read(mixer, hidden, q, k, v, g, beta=None):
    """o ``[T, H, V]`` of q, k, g ``[T, H, K]``, v ``[T, H, V]``, beta ``[T, H]``: every query walks back over the tokens.

    λ's last level is shared.
    """
    scales = None if mixer.level_scale is None else mixer.level_scale(hidden)
    o, kept = torch.zeros_like(v), torch.exp(g)
    for t in range(len(hidden)):
        reader = q[t]  # qᵀ times the transitions after s
        for s in range(t, -1, -1):
            write = (reader * k[s]).sum(-1, keepdim=True) * (1 if beta is None else beta[s, :, None])
            scale = 1 if scales is None else scales[t, :, min(level(t, s), scales.shape[-1] - 1), None]
            o[t] += scale * write * v[s]
            reader = kept[s] * (reader if beta is None else reader - write * k[s])
    return o


def mamba2_oracle(mixer, hidden):
    z, x, B, C, dt = mixer.in_proj(hidden).split([12, 12, 10, 10, 4], dim=-1)
    x, B, C = mixer.conv(torch.cat([x, B, C], -1).unsqueeze(0))[0][0].split([12, 10, 10], dim=-1)
    x, (B, C) = x.view(-1, 4, 3), (y.view(-1, 2, 5).repeat_interleave(2, 1) for y in (B, C))
    dt = torch.log1p(torch.exp(dt + mixer.dt_bias)).unsqueeze(-1)
    g = (-torch.exp(mixer.A_log)[:, None] * dt).expand_as(B)
    y = read(mixer, hidden, C, B, x * dt, g) + mixer.D[:, None] * x
    return mixer.out_proj(F.rms_norm(y.flatten(1) * F.silu(z), (12,), eps=1e-6))


def gated_deltanet_oracle(mixer, hidden):
    qkv, gate, a, b = mixer.in_proj(hidden).split([32, 12, 4, 4], dim=-1)
    q, k, v = mixer.conv(qkv.unsqueeze(0))[0][0].split([10, 10, 12], dim=-1)
    q, k = (x.view(-1, 2, 5).repeat_interleave(2, 1) for x in (q, k))
    q, k = (x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    g = (-torch.exp(mixer.A_log) * F.softplus(a + mixer.dt_bias)).unsqueeze(-1).expand_as(q)
    o = read(mixer, hidden, q, k, v.view(-1, 4, 3), g, torch.sigmoid(b))
    return mixer.out_proj(F.rms_norm(o, (3,), eps=1e-6).flatten(1) * F.silu(gate))


def kda_oracle(mixer, hidden):
    qkv, gate, f, b = mixer.in_proj(hidden).split([32, 3, 3, 4], dim=-1)
    q, k, v = mixer.conv(qkv.unsqueeze(0))[0][0].split([10, 10, 12], dim=-1)
    q, k = (x.view(-1, 2, 5).repeat_interleave(2, 1) for x in (q, k))
    q, k = (x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    f = (f @ mixer.decay_proj.weight.T + mixer.dt_bias).view(-1, 4, 5)
    g = -torch.exp(mixer.A_log)[:, None] * torch.log1p(torch.exp(f))
    o = read(mixer, hidden, q, k, v.view(-1, 4, 3), g, torch.sigmoid(b))
    gate = torch.sigmoid(gate @ mixer.gate_proj.weight.T)
    return mixer.out_proj(F.rms_norm(o, (3,), eps=1e-6).flatten(1) * gate)


def gla_oracle(mixer, hidden):
    q, k, v, gate, low = mixer.in_proj(hidden).split([20, 10, 6, 12, 2], dim=-1)
    g = torch.log(torch.sigmoid(low @ mixer.decay_proj.weight.T + mixer.decay_proj.bias)) / 0.5
    k, v, g = (x.view(-1, 2, width).repeat_interleave(2, 1) for x, width in ((k, 5), (v, 3), (g, 5)))
    o = read(mixer, hidden, q.view(-1, 4, 5), k, v, g)
    return mixer.out_proj(F.rms_norm(o, (3,), eps=1e-6).flatten(1) * F.silu(gate))


def retnet_oracle(mixer, hidden):
    """Pairs of channels are complex numbers, and a position turns them."""
    q, k, v, gate = mixer.in_proj(hidden).split([24, 12, 6, 12], dim=-1)
    q, k, v = q.view(-1, 4, 6), k.view(-1, 2, 6).repeat_interleave(2, 1), v.view(-1, 2, 3).repeat_interleave(2, 1)
    position, frequency = torch.arange(len(hidden)), 10_000.0 ** -(torch.arange(3) / 3)
    turn = torch.polar(torch.ones(len(hidden), 1, 3), position[:, None, None] * frequency).to(torch.complex128)
    q, k = (torch.complex(x[..., :3].contiguous(), x[..., 3:].contiguous()) * turn for x in (q, k))
    q, k = (torch.cat([x.real, x.imag], dim=-1) for x in (q, k))
    g = torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256]).double().log()
    o = read(mixer, hidden, q, k, v, g[None, :, None].expand_as(q))
    return mixer.out_proj(F.rms_norm(o, (3,), eps=1e-6).flatten(1) * F.silu(gate))


def lightning_oracle(mixer, hidden):
    qkv, gate = mixer.in_proj(hidden).split([36, 12], dim=-1)
    q, k, v = F.silu(qkv).view(-1, 3, 4, 3).unbind(1)
    g = -0.5 * torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256], dtype=torch.float64)
    o = read(mixer, hidden, q, k, v, g[None, :, None].expand_as(q)).flatten(1)
    return mixer.out_proj(F.rms_norm(o, (12,), eps=1e-6) * torch.sigmoid(gate))


ORACLES = {
    "mamba2": mamba2_oracle,
    "gated_deltanet": gated_deltanet_oracle,
    "gla": gla_oracle,
    "kda": kda_oracle,
    "retnet": retnet_oracle,
    "lightning": lightning_oracle,
}


@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_equals_the_definition(name):
    """40 tokens need 7 levels and there are 6: the last is shared."""
    mixer = make(name)
    hidden = torch.randn(2, 40, HIDDEN, dtype=torch.float64)
    oracle = ORACLES[name.removeprefix("log_linear_")]
    want = torch.stack([oracle(mixer, row) for row in hidden])
    near = 1e-6 if mixer.reads_positions else 1e-10  # angles are float32, here in another order of products
    torch.testing.assert_close(mixer(hidden)[0], want, rtol=0, atol=near)


@pytest.mark.parametrize("name", [name for name in RECURRENT if name.startswith("log_linear_")])
@torch.no_grad()
def test_scales_of_one_are_the_linear_model(name):
    log_linear, linear = make(name), make(name.removeprefix("log_linear_"))
    missing, unexpected = linear.load_state_dict(log_linear.state_dict(), strict=False)
    assert missing == []
    assert {key.split(".")[0] for key in unexpected} == {"level_scale"}
    hidden = torch.randn(1, 150, HIDDEN, dtype=torch.float64)
    hidden[..., 0] = 1  # so that dl = 1 and λ = softplus(log(e - 1)) = 1
    log_linear.level_scale.dl_proj.weight.zero_()[:, 0] = 1
    log_linear.level_scale.L.fill_(math.log(math.e - 1))
    torch.testing.assert_close(log_linear(hidden)[0], linear(hidden)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PIECES)
@torch.no_grad()
def test_continues_at_any_split(name):
    """Prefill, one token, none, several, and across chunk borders (64 tokens): all one function at different T."""
    mixer, hidden = make(name), torch.randn(2, 150, HIDDEN, dtype=torch.float64)
    pieces, state = [], None
    for piece in hidden.split([7, 1, 0, 1, 64, 70, 1, 6], dim=1):
        out, state = mixer(piece, state, output_state=True)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, dim=1), mixer(hidden)[0], rtol=0, atol=1e-10)
    assert state.position.tolist() == [150, 150]


@pytest.mark.parametrize("name", PIECES)
@torch.no_grad()
def test_packed_sequences_and_rows_at_different_positions(name):
    mixer = make(name)
    lengths, more = [70, 0, 33, 129], [5, 64, 0, 12]
    sequences = [torch.randn(1, n + m, HIDDEN, dtype=torch.float64) for n, m in zip(lengths, more)]
    whole = [mixer(sequence)[0] for sequence in sequences]

    packed = torch.cat([sequence[:, :n] for sequence, n in zip(sequences, lengths)], dim=1)
    out, state = mixer(packed, None, True, torch.tensor([0, *lengths]).cumsum(0))
    want = torch.cat([y[:, :n] for y, n in zip(whole, lengths)], dim=1)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-10)
    assert state.position.tolist() == lengths

    packed = torch.cat([sequence[:, n:] for sequence, n in zip(sequences, lengths)], dim=1)
    out, after = mixer(packed, state, True, torch.tensor([0, *more]).cumsum(0))
    want = torch.cat([y[:, n:] for y, n in zip(whole, lengths)], dim=1)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-10)

    # The same states as rows of a batch, in another order, one more token each; the given state is not written into.
    token = torch.randn(3, 1, HIDDEN, dtype=torch.float64)
    order = torch.tensor([3, 0, 3])
    out, _ = mixer(token, after.reorder(order), True)
    for row, index in enumerate(order.tolist()):
        alone = torch.cat([sequences[index], token[row : row + 1]], dim=1)
        torch.testing.assert_close(out[row, -1], mixer(alone)[0][0, -1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PIECES)
def test_states_are_functional_and_carry_gradients(name):
    mixer, hidden = make(name), torch.randn(1, 80, HIDDEN, dtype=torch.float64, requires_grad=True)
    _, state = mixer(hidden[:, :70], output_state=True)
    before = state.clone()
    out, _ = mixer(hidden[:, 70:], state, output_state=True)
    again, _ = mixer(hidden[:, 70:], before)
    assert torch.equal(out, again), "the first call wrote into the state that it was given"
    (split,) = torch.autograd.grad(out.square().sum(), hidden)
    (whole,) = torch.autograd.grad(mixer(hidden)[0][:, 70:].square().sum(), hidden)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", PIECES)
@torch.no_grad()
def test_a_state_for_decoding_is_updated_in_place(name):
    """From any position, by calls of any length and packed ones: the ordinary results, in the same object and buffers."""
    mixer, hidden = make(name), torch.randn(3, 230, HIDDEN, dtype=torch.float64)
    want = mixer(hidden)[0]
    _, ordinary = mixer(hidden[:, :60], output_state=True)
    kept, state = ordinary.clone(), ordinary.for_decoding(300)
    where = [tensor.data_ptr() for tensor in state._tensors()]
    pieces, lengths = [], [1, 1, 3, 0, 64, 1, 65, 2, 33]
    for piece in hidden[:, 60:].split(lengths, dim=1):
        out, after = mixer(piece, state, output_state=True)
        pieces.append(out)
        assert after is state
    torch.testing.assert_close(torch.cat(pieces, dim=1), want[:, 60:], rtol=0, atol=1e-10)
    assert state.position.tolist() == [230] * 3
    assert [tensor.data_ptr() for tensor in state._tensors()] == where
    for one, other in zip(ordinary._tensors(), kept._tensors()):
        assert torch.equal(one, other), "a state for decoding shares nothing with the state it was made from"

    more = [5, 0, 1]
    packed = torch.randn(1, sum(more), HIDDEN, dtype=torch.float64)
    out, after = mixer(packed, state, True, torch.tensor([0, *more]).cumsum(0))
    assert after is state
    assert state.position.tolist() == [230 + n for n in more]
    token = torch.randn(3, 1, HIDDEN, dtype=torch.float64)
    last, _ = mixer(token, state)
    for row, piece in enumerate(packed.split(more, dim=1)):
        alone = mixer(torch.cat([hidden[row : row + 1], piece, token[row : row + 1]], dim=1))[0]
        torch.testing.assert_close(last[row], alone[0, -1:], rtol=0, atol=1e-10)
        torch.testing.assert_close(out.split(more, dim=1)[row], alone[:, 230:-1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PIECES)
@torch.no_grad()
def test_a_state_for_decoding_comes_back(name):
    """To an ordinary state, to a snapshot, and into buffers with more room."""
    mixer, hidden = make(name), torch.randn(2, 140, HIDDEN, dtype=torch.float64)
    want = mixer(hidden)[0][:, 130:]
    _, ordinary = mixer(hidden[:, :130], output_state=True)
    assert ordinary.ordinary() is ordinary
    state = ordinary.for_decoding(140)
    snapshot, grown, back = state.clone(), state.grow(1000).clone(), state.ordinary()
    assert not back.in_place
    assert grown.max_context is None or grown.max_context >= 1000
    mixer(hidden[:, 7:9], state)
    for one in (back, state.restore_(snapshot), grown):
        torch.testing.assert_close(mixer(hidden[:, 130:], one)[0], want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PIECES)
def test_under_autograd_a_state_for_decoding_is_left_alone(name):
    mixer, hidden = make(name), torch.randn(2, 80, HIDDEN, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        state = mixer(hidden[:, :70], output_state=True)[1].for_decoding(100)
    kept = state.clone()
    out, after = mixer(hidden[:, 70:], state, output_state=True)
    assert not after.in_place
    assert all(torch.equal(one, other) for one, other in zip(state._tensors(), kept._tensors()))
    (gradient,) = torch.autograd.grad(out.square().sum(), hidden)
    assert (gradient[:, 70:] != 0).any(-1).all()


@pytest.mark.parametrize("name", PIECES)
@torch.no_grad()
def test_bfloat16_steps_stay_close(name):
    """In bfloat16 and under autocast, with the switch of dtypes that a state made elsewhere brings."""
    mixer, hidden = make(name).float(), torch.randn(2, 100, HIDDEN)
    want = mixer(hidden)[0][:, 60:]

    def decode(hidden):
        _, state = mixer(hidden[:, :60], output_state=True)
        state = state.for_decoding(100)
        return torch.cat([mixer(token, state)[0] for token in hidden[:, 60:].split(1, dim=1)], dim=1)

    plain = mixer(hidden[:, :60], output_state=True)[1].for_decoding(100)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, switched = decode(hidden), mixer(hidden[:, 60:], plain)[0]
    low = mixer.bfloat16() and decode(hidden.bfloat16())
    for out in (mixed, switched, low):
        assert out.dtype == torch.bfloat16
        assert (out.float() - want).norm() / want.norm() < 0.03


@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet", "kda"])
def test_initialisation(name):
    torch.manual_seed(1)
    low, high = 1.0, 16.0
    if name == "mamba2":
        mixer = LogLinearMamba2(8, num_heads=4000, head_dim=1, state_size=1, log_linear=False)
        assert torch.equal(mixer.D, torch.ones(4000))
    elif name == "kda":
        mixer = LogLinearKDA(8, 4000, key_dim=1, value_dim=1, log_linear=False)
    else:
        mixer = LogLinearGatedDeltaNet(8, 4000, key_dim=1, value_dim=1, log_linear=False)
        low = 0.0
    step = F.softplus(mixer.dt_bias.detach().double()).log10()
    assert -3 <= step.min() < -2.99
    assert -1.01 < step.max() <= -0.9999
    assert abs(step.mean() + 2) < 0.05, "time steps must be uniform in their logarithm"
    rate = mixer.A_log.detach().double().exp()
    assert low < rate.min() < low + 0.05
    assert high - 0.05 < rate.max() < high + 1e-4
    assert abs(rate.mean() - (low + high) / 2) < 0.3


def test_numbers_of_heads_that_do_not_fit_are_named():
    kinds = [(LogLinearMamba2, "num_groups"), (SoftmaxAttention, "num_kv_heads"), (LogLinearGLA, "num_kv_heads")]
    for kind, name in [*kinds, (LogLinearGatedDeltaNet, "num_key_heads"), (LogLinearKDA, "num_key_heads")]:
        whole = kind in (LogLinearMamba2, SoftmaxAttention)
        sizes = {"head_dim": 4} if whole else {"key_dim": 4, "value_dim": 4}
        for heads, groups in ((4, 3), (4, 0), (0, 1), (-4, -2)):
            with pytest.raises(
                ValueError, match=f"num_heads must be a positive multiple of {name}={groups}: got {heads}"
            ):
                kind(HIDDEN, num_heads=heads, **sizes, **{name: groups})


@pytest.mark.parametrize("name", RECURRENT)
def test_weight_decay_flags(name):
    """They are those of copies too, and of modules that came off the meta device."""
    mixer = make(name)
    want = {"A_log", "dt_bias"} if name.endswith(("mamba2", "deltanet", "kda")) else set()
    want |= {"D"} if name.endswith("mamba2") else set()
    want |= {"level_scale.L"} if name.startswith("log") else set()
    for module in (mixer, copy.deepcopy(mixer), copy.deepcopy(mixer).to("meta").to_empty(device="cpu")):
        flagged = {key for key, parameter in module.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
        assert flagged == want


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_bfloat16_stays_close(name):
    """Relative error of the whole mixer in bfloat16 and under autocast: a few roundings of 2^-9 each."""
    mixer, hidden = make(name).float(), torch.randn(2, 100, HIDDEN)
    want = mixer(hidden)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mixer(hidden)[0]
    low = mixer.bfloat16()(hidden.bfloat16())[0]
    for out in (mixed, low):
        assert out.dtype == torch.bfloat16
        assert (out.float() - want).norm() / want.norm() < 0.03
