"""Both recurrent mixers against their definitions written out token by token, and every mixer against itself in pieces."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from loglinear.fenwick import level
from loglinear.layers import LogLinearGatedDeltaNet, LogLinearMamba2, SoftmaxAttention

HIDDEN = 12
MIXERS = ["log_linear_mamba2", "mamba2", "log_linear_gated_deltanet", "gated_deltanet", "attention"]
RECURRENT = MIXERS[:4]


def make(name, **overrides):
    torch.manual_seed(0)
    if name == "attention":
        return SoftmaxAttention(HIDDEN, num_heads=4, head_dim=6, num_kv_heads=2).double()
    common = {"num_levels": 6, "log_linear": name.startswith("log_linear")} | overrides
    if name.endswith("mamba2"):
        mixer = LogLinearMamba2(HIDDEN, num_heads=4, head_dim=3, state_size=5, num_groups=2, **common)
    else:
        mixer = LogLinearGatedDeltaNet(HIDDEN, num_heads=4, key_dim=5, value_dim=3, num_key_heads=2, **common)
    return mixer.double()


def scale_of(mixer, hidden, t, s, head):
    """λ of token t for token s; the last level is shared."""
    if mixer.level_scale is None:
        return 1.0
    scales = mixer.level_scale(hidden)
    return scales[t, head, min(level(t, s), scales.shape[-1] - 1)]


def mamba2_oracle(mixer, hidden):
    """``[T, hidden]``: dense, one pair of tokens at a time."""
    inner, keys, heads, groups = 12, 10, 4, 2
    z, xBC, dt = mixer.in_proj(hidden).split([inner, inner + 2 * keys, heads], dim=-1)
    xBC = mixer.conv(xBC.unsqueeze(0))[0][0]
    x, B, C = xBC[:, :inner].view(-1, heads, 3), xBC[:, inner : inner + keys], xBC[:, inner + keys :]
    B, C = B.view(-1, groups, 5), C.view(-1, groups, 5)
    dt = torch.log1p(torch.exp(dt + mixer.dt_bias))
    decay = -torch.exp(mixer.A_log) * dt
    y = torch.zeros_like(x)
    for t in range(len(hidden)):
        for head in range(heads):
            group = head // 2
            y[t, head] = mixer.D[head] * x[t, head]
            for s in range(t + 1):
                weight = torch.exp(decay[s + 1 : t + 1, head].sum()) * (C[t, group] @ B[s, group])
                y[t, head] += scale_of(mixer, hidden, t, s, head) * weight * dt[s, head] * x[s, head]
    gated = y.flatten(1) * F.silu(z)
    return mixer.out_proj(F.rms_norm(gated, (inner,), eps=1e-6))


def gated_deltanet_oracle(mixer, hidden):
    """``[T, hidden]``: for every query, the product of all later transitions applied to each token's write."""
    keys, values, heads = 10, 12, 4
    qkv, gate, a, b = mixer.in_proj(hidden).split([2 * keys + values, values, heads, heads], dim=-1)
    q, k, v = mixer.conv(qkv.unsqueeze(0))[0][0].split([keys, keys, values], dim=-1)
    q, k, v = q.view(-1, 2, 5), k.view(-1, 2, 5), v.view(-1, heads, 3)
    q, k = (x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    beta = torch.sigmoid(b)
    decay = -torch.exp(mixer.A_log) * F.softplus(a + mixer.dt_bias)
    o = torch.zeros_like(v)
    for t in range(len(hidden)):
        for head in range(heads):
            key = k[:, head // 2]
            reader = q[t, head // 2]  # qᵀ times the transitions after s, as s walks back
            for s in range(t, -1, -1):
                write = beta[s, head] * (reader @ key[s])
                o[t, head] += scale_of(mixer, hidden, t, s, head) * write * v[s, head]
                reader = torch.exp(decay[s, head]) * (reader - write * key[s])
    normed = F.rms_norm(o, (3,), eps=1e-6) * F.silu(gate).view(-1, heads, 3)
    return mixer.out_proj(normed.flatten(1))


@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_equals_the_definition(name):
    """40 tokens need 7 levels and there are 6: the last is shared."""
    mixer = make(name)
    hidden = torch.randn(2, 40, HIDDEN, dtype=torch.float64)
    oracle = mamba2_oracle if name.endswith("mamba2") else gated_deltanet_oracle
    want = torch.stack([oracle(mixer, row) for row in hidden])
    torch.testing.assert_close(mixer(hidden)[0], want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["log_linear_mamba2", "log_linear_gated_deltanet"])
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


@pytest.mark.parametrize("name", MIXERS)
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


@pytest.mark.parametrize("name", MIXERS)
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


@pytest.mark.parametrize("name", MIXERS)
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


@pytest.mark.parametrize("name", MIXERS)
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


@pytest.mark.parametrize("name", MIXERS)
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


@pytest.mark.parametrize("name", MIXERS)
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


@pytest.mark.parametrize("name", MIXERS)
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


@pytest.mark.parametrize("name", RECURRENT)
def test_initialisation(name):
    torch.manual_seed(1)
    if name.endswith("mamba2"):
        mixer = LogLinearMamba2(8, num_heads=4000, head_dim=1, state_size=1, log_linear="log" in name, num_levels=2)
        low, high = 1.0, 16.0
        assert torch.equal(mixer.D, torch.ones(4000))
    else:
        mixer = LogLinearGatedDeltaNet(8, 4000, key_dim=1, value_dim=1, log_linear="log" in name, num_levels=2)
        low, high = 0.0, 16.0
    step = F.softplus(mixer.dt_bias.detach().double()).log10()
    assert -3 <= step.min() < -2.99
    assert -1.01 < step.max() <= -0.9999
    assert abs(step.mean() + 2) < 0.05, "time steps must be uniform in their logarithm"
    rate = mixer.A_log.detach().double().exp()
    assert low < rate.min() < low + 0.05
    assert high - 0.05 < rate.max() < high + 1e-4
    assert abs(rate.mean() - (low + high) / 2) < 0.3


def test_numbers_of_heads_that_do_not_fit_are_named():
    kinds = {"num_groups": LogLinearMamba2, "num_key_heads": LogLinearGatedDeltaNet, "num_kv_heads": SoftmaxAttention}
    for name, kind in kinds.items():
        sizes = {"key_dim": 4, "value_dim": 4} if kind is LogLinearGatedDeltaNet else {"head_dim": 4}
        for heads, groups in ((4, 3), (4, 0), (0, 1), (-4, -2)):
            with pytest.raises(
                ValueError, match=f"num_heads must be a positive multiple of {name}={groups}: got {heads}"
            ):
                kind(HIDDEN, num_heads=heads, **sizes, **{name: groups})


@pytest.mark.parametrize("name", RECURRENT)
def test_weight_decay_flags(name):
    """They are those of copies too, and of modules that came off the meta device."""
    mixer = make(name)
    want = {"A_log", "dt_bias"} | ({"D"} if name.endswith("mamba2") else set())
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
