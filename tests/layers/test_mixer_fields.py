"""The fields in which published mixers differ, against definitions written out token by token, and against pieces."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_mixers import read

from loglinear.fenwick import level
from loglinear.layers import (
    LogLinearGatedDeltaNet,
    LogLinearGLA,
    LogLinearKDA,
    LogLinearMamba2,
    LogLinearRetention,
    mamba2,
)

HIDDEN, HEADS, GROUPS, K, V = 12, 4, 2, 5, 6

DELTA = {
    "convolution with biases": {"conv_bias": True},
    "no convolution": {"conv_width": 0},
    "no gate": {"gate_activation": None},
    "sigmoid gate": {"gate_activation": "sigmoid"},
    "no decay": {"decay": False},
    "no beta": {"use_beta": False},
    "beta times two": {"neg_eigval": True},
    "relu": {"qk_activation": "relu"},
    "elu, sum": {"qk_activation": "elu", "qk_norm": "sum"},
    "identity, none of the rest": {
        "qk_activation": "identity",
        "decay": False,
        "use_beta": False,
        "neg_eigval": True,
        "gate_activation": None,
        "conv_width": 0,
    },
}
MAMBA2 = {
    "biases": {"use_bias": True, "level_scale_bias": True},
    "no bias of the convolution": {"conv_bias": False},
    "skip of every channel": {"skip_per_channel": True},
    "norm in groups, before the gate": {"norm_groups": 2, "norm_before_gate": True},
    "no norm": {"norm": False},
    "time steps with limits": {"dt_limit": (0.3, 0.8)},
    "multipliers": {"in_multiplier": 0.6, "in_multipliers": [0.5, 0.7, 1.3, 1.1, 0.9], "use_bias": True},
    "activation of the convolution": {"conv_activation": "sigmoid"},
}
KDA = {
    "a bound": {"decay_bound": -5.0},
    "whole matrices, relu gate": {"decay_rank": 0, "gate_rank": 0, "gate_activation": "relu"},
    "narrow matrices, biases": {"decay_rank": 2, "gate_rank": 3, "gate_bias": True, "conv_bias": True},
    "no convolution, beta times two": {"conv_width": 0, "neg_eigval": True},
}
GLA = {
    "convolution with biases": {"conv_width": 4, "conv_bias": True, "decay_normalizer": 2.0},
    "no gate, relu": {"gate_activation": None, "qk_activation": "relu", "decay_rank": 3},
    "a least decay, sigmoid gate": {"decay_min": -0.05, "gate_activation": "sigmoid"},
}
FIELDS = {"delta": DELTA, "mamba2": MAMBA2, "kda": KDA, "gla": GLA}
CASES = [(kind, name) for kind, fields in FIELDS.items() for name in fields]


def make(kind, name, log_linear=True):
    """A mixer with every parameter away from its start, so that none can be left out unseen."""
    torch.manual_seed(0)
    common = {"num_levels": 5, "log_linear": log_linear}
    if kind == "delta":
        mixer = LogLinearGatedDeltaNet(HIDDEN, HEADS, K, V, GROUPS, **common, **DELTA[name])
    elif kind == "mamba2":
        mixer = LogLinearMamba2(HIDDEN, HEADS, V, K, GROUPS, **common, **MAMBA2[name])
    else:
        mixer = {"kda": LogLinearKDA, "gla": LogLinearGLA}[kind](
            HIDDEN, HEADS, K, V, GROUPS, **common, **FIELDS[kind][name]
        )
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer.double()


def scale_of(mixer, hidden, t, s, head):
    if mixer.level_scale is None:
        return 1.0
    levels = mixer.level_scale.L.shape[1]
    which = min(level(t, s), levels - 1)
    row = head * levels + which
    dl = mixer.level_scale.dl_proj.weight[row] @ hidden[t]
    if mixer.level_scale.dl_proj.bias is not None:
        dl = dl + mixer.level_scale.dl_proj.bias[row]
    return F.softplus(mixer.level_scale.L[head, which] * dl)


def convolved(mixer, x):
    """``[T, channels]`` before the activation: four taps, the last of them at the token itself."""
    if mixer.conv.weight is None:
        return x
    padded = F.pad(x, (0, 0, 3, 0))
    y = sum(padded[i : i + len(x)] * mixer.conv.weight[:, i] for i in range(4))
    return y if mixer.conv.bias is None else y + mixer.conv.bias


def normed(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def delta_definition(mixer, hidden, qk_activation="silu", qk_norm="l2", gate_activation="silu", **fields):
    projected = mixer.in_proj(hidden)
    keys, values = GROUPS * K, HEADS * V
    x = convolved(mixer, projected[:, : 2 * keys + values])
    rest = projected[:, 2 * keys + values :]
    act = {"silu": F.silu, "relu": F.relu, "elu": lambda x: torch.where(x > 0, x + 1, x.exp()), "identity": lambda x: x}
    q, k, v = act[qk_activation](x[:, :keys]), act[qk_activation](x[:, keys : 2 * keys]), F.silu(x[:, 2 * keys :])
    q, k, v = q.view(-1, GROUPS, K), k.view(-1, GROUPS, K), v.view(-1, HEADS, V)
    if qk_norm == "sum":
        q, k = (x / x.abs().sum(-1, keepdim=True) for x in (q, k))
    else:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    gate = None
    if gate_activation is not None:
        gate, rest = rest[:, :values].view(-1, HEADS, V), rest[:, values:]
    decay = torch.zeros(len(hidden), HEADS, dtype=torch.float64)
    if fields.get("decay", True):
        decay, rest = -mixer.A_log.exp() * F.softplus(rest[:, :HEADS] + mixer.dt_bias), rest[:, HEADS:]
    beta = torch.sigmoid(rest) if fields.get("use_beta", True) else torch.ones_like(decay)
    beta = 2 * beta if fields.get("neg_eigval") else beta
    o = torch.zeros_like(v)
    for t in range(len(hidden)):
        for head in range(HEADS):
            key, reader = k[:, head // 2], q[t, head // 2]
            for s in range(t, -1, -1):
                write = beta[s, head] * (reader @ key[s])
                o[t, head] += scale_of(mixer, hidden, t, s, head) * write * v[s, head]
                reader = torch.exp(decay[s, head]) * (reader - write * key[s])
    o = normed(o, mixer.norm.weight)
    if gate is not None:
        o = o * (torch.sigmoid(gate) if gate_activation == "sigmoid" else F.silu(gate))
    return mixer.out_proj(o.flatten(1))


def mamba2_definition(
    mixer, hidden, norm=True, norm_groups=1, norm_before_gate=False, dt_limit=(0, math.inf), **fields
):
    inner, keys = HEADS * V, GROUPS * K
    factors = torch.tensor(fields.get("in_multipliers", [1.0] * 5)).repeat_interleave(
        torch.tensor([inner, inner, keys, keys, HEADS])
    )
    projected = mixer.in_proj(hidden * fields.get("in_multiplier", 1.0)) * factors
    z, x, dt = projected.split([inner, inner + 2 * keys, HEADS], dim=-1)
    x = convolved(mixer, x)
    x = torch.sigmoid(x) if fields.get("conv_activation") else F.silu(x)
    x, B, C = x[:, :inner].view(-1, HEADS, V), x[:, inner : inner + keys], x[:, inner + keys :]
    B, C = B.view(-1, GROUPS, K), C.view(-1, GROUPS, K)
    dt = F.softplus(dt + mixer.dt_bias).clamp(*dt_limit)
    decay = -mixer.A_log.exp() * dt
    D = mixer.D.view(HEADS, V) if fields.get("skip_per_channel") else mixer.D.view(HEADS, 1)
    y = D * x
    for t in range(len(hidden)):
        for head in range(HEADS):
            for s in range(t + 1):
                weight = torch.exp(decay[s + 1 : t + 1, head].sum()) * (C[t, head // 2] @ B[s, head // 2])
                y[t, head] += scale_of(mixer, hidden, t, s, head) * weight * dt[s, head] * x[s, head]
    y, gate = y.flatten(1), F.silu(z)
    if not norm:
        return mixer.out_proj(y * gate)
    y = y if norm_before_gate else y * gate
    parts = y.view(len(y), norm_groups, -1)
    y = normed(parts, mixer.norm.weight.view(norm_groups, -1)).flatten(1)
    return mixer.out_proj(y * gate if norm_before_gate else y)


def heads_of(x, count, width):
    """``[T, HEADS, width]`` of ``count`` heads, each serving several."""
    return x.view(-1, count, width).repeat_interleave(HEADS // count, 1)


def kda_definition(mixer, hidden, decay_bound=None, gate_activation="sigmoid", **fields):
    keys, values = GROUPS * K, HEADS * V
    widths = [values if mixer.gate_proj is None else mixer.gate_proj.in_features]
    widths += [HEADS * K if mixer.decay_proj is None else mixer.decay_proj.in_features, HEADS]
    x, gate, f, b = mixer.in_proj(hidden).split([2 * keys + values, *widths], dim=-1)
    q, k, v = F.silu(convolved(mixer, x)).split([keys, keys, values], dim=-1)
    q, k = (heads_of(x, GROUPS, K) for x in (q, k))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    gate = gate if mixer.gate_proj is None else mixer.gate_proj(gate)
    f = ((f if mixer.decay_proj is None else mixer.decay_proj(f)) + mixer.dt_bias).view(-1, HEADS, K)
    rate = mixer.A_log.exp()[:, None]
    g = -rate * torch.log1p(f.exp()) if decay_bound is None else decay_bound / (1 + torch.exp(-rate * f))
    beta = torch.sigmoid(b) * (2 if fields.get("neg_eigval") else 1)
    o = normed(read(mixer, hidden, q, k, v.view(-1, HEADS, V), g, beta), mixer.norm.weight).flatten(1)
    return mixer.out_proj(o * (gate.relu() if gate_activation == "relu" else torch.sigmoid(gate)))


def gla_definition(mixer, hidden, gate_activation="silu", qk_activation=None, **fields):
    q, k, v, gate = HEADS * K, GROUPS * K, GROUPS * V, 0 if gate_activation is None else HEADS * V
    x, gate, low = mixer.in_proj(hidden).split([q + k + v, gate, fields.get("decay_rank", 16)], dim=-1)
    x = F.silu(convolved(mixer, x)) if fields.get("conv_width") else x
    q, k, v = x.split([q, k, v], dim=-1)
    q, k, v = heads_of(q, HEADS, K), heads_of(k, GROUPS, K), heads_of(v, GROUPS, V)
    q, k = (x.relu() if qk_activation == "relu" else x for x in (q, k))
    g = torch.log(torch.sigmoid(mixer.decay_proj(low))) / fields.get("decay_normalizer", 16)
    g = heads_of(g.clamp(min=fields.get("decay_min", -math.inf)), GROUPS, K)
    o = read(mixer, hidden, q, k, v, g)
    o = normed(o, mixer.norm.weight).flatten(1)
    if gate_activation is not None:
        o = o * (torch.sigmoid(gate) if gate_activation == "sigmoid" else F.silu(gate))
    return mixer.out_proj(o)


DEFINITIONS = {"delta": delta_definition, "mamba2": mamba2_definition, "kda": kda_definition, "gla": gla_definition}


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[" ".join(case) for case in CASES])
@torch.no_grad()
def test_equals_the_definition_whole_and_in_pieces(kind, name):
    """20 tokens need 6 levels and there are 5. The pieces are a prefill, single tokens and a few, in place and not."""
    definition, fields = DEFINITIONS[kind], FIELDS[kind]
    for log_linear in (True, False):
        mixer, hidden = make(kind, name, log_linear), torch.randn(1, 20, HIDDEN, dtype=torch.float64)
        want = definition(mixer, hidden[0], **fields[name])
        out, state = mixer(hidden[:, :14], output_state=True)
        torch.testing.assert_close(mixer(hidden)[0][0], want, rtol=0, atol=1e-10)
        torch.testing.assert_close(out[0], want[:14], rtol=0, atol=1e-10)
        in_place = state.for_decoding(32)
        for piece in range(14, 20):
            for seen in (state, in_place):
                out, after = mixer(hidden[:, piece : piece + 1], seen, output_state=True)
                torch.testing.assert_close(out[0, 0], want[piece], rtol=0, atol=1e-10)
                state, in_place = (after, in_place) if seen is state else (state, after)


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[" ".join(case) for case in CASES])
def test_every_parameter_gets_a_gradient(kind, name):
    mixer = make(kind, name)
    mixer(torch.randn(1, 9, HIDDEN, dtype=torch.float64))[0].square().sum().backward()
    assert [name for name, x in mixer.named_parameters() if x.grad is None or not x.grad.any()] == []


def test_packed_sequences_without_a_convolution():
    mixer = make("delta", "no convolution")
    hidden = torch.randn(1, 20, HIDDEN, dtype=torch.float64)
    packed = mixer(hidden, cu_seqlens=torch.tensor([0, 8, 8, 20]))[0]
    torch.testing.assert_close(packed[:, :8], mixer(hidden[:, :8])[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(packed[:, 8:], mixer(hidden[:, 8:])[0], rtol=0, atol=1e-10)


def test_values_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="qk_norm must be 'l2' or 'sum': got 'l1'"):
        LogLinearGatedDeltaNet(HIDDEN, HEADS, K, V, qk_norm="l1")
    with pytest.raises(ValueError, match=r"qk_activation must be one of .*: got 'gelu'"):
        LogLinearGatedDeltaNet(HIDDEN, HEADS, K, V, qk_activation="gelu")
    with pytest.raises(ValueError, match=r"dt_limit must be .*, 0 <= least <= greatest: got \(0.2, 0.1\)"):
        LogLinearMamba2(HIDDEN, HEADS, V, K, dt_limit=(0.2, 0.1))
    with pytest.raises(ValueError, match="in_multipliers must have five factors, of z, x, B, C and dt"):
        LogLinearMamba2(HIDDEN, HEADS, V, K, in_multipliers=[1.0])
    with pytest.raises(ValueError, match="groups must divide the width, 24: got 5"):
        LogLinearMamba2(HIDDEN, HEADS, V, K, norm_groups=5)
    with pytest.raises(ValueError, match=r"activation must be one of .*: got 'gelu'"):
        LogLinearMamba2(HIDDEN, HEADS, V, K, conv_activation="gelu")
    with pytest.raises(ValueError, match=r"decay_bound must be negative, the log of a decay: got 5\.0"):
        LogLinearKDA(HIDDEN, HEADS, K, V, decay_bound=5.0)
    with pytest.raises(ValueError, match=r"gate_bias must be false where the output gate is one matrix"):
        LogLinearKDA(HIDDEN, HEADS, K, V, gate_rank=0, gate_bias=True)
    with pytest.raises(ValueError, match="decay_rank must be at least 1: got 0"):
        LogLinearGLA(HIDDEN, HEADS, K, V, decay_rank=0)
    with pytest.raises(ValueError, match=r"decays must be one of \['retention', 'slopes'\]: got 'alibi'"):
        LogLinearRetention(HIDDEN, HEADS, K, V, decays="alibi")
    with pytest.raises(ValueError, match=r"key_dim must be even \(rotary positions turn pairs\): got 5"):
        LogLinearRetention(HIDDEN, HEADS, 5, V)


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({}, True),
        ({"norm": False}, False),
        ({"conv_activation": "relu"}, False),
        ({"dt_limit": (0.1, 1.0)}, False),
        ({"skip_per_channel": True}, False),
        ({"in_multiplier": 2.0}, False),
    ],
)
def test_the_kernels_take_a_whole_mamba2_mixer_only_where_they_know_its_fields(monkeypatch, fields, taken):
    for module, name in (
        (mamba2.pointwise, "has_kernels"),
        (mamba2.convolution, "has_kernel"),
        (mamba2.dispatch, "attention"),
    ):
        monkeypatch.setattr(module, name, lambda *given: True)
    mixer = LogLinearMamba2(8, 4, head_dim=4, state_size=4, **fields)
    assert mixer._mixes_whole(torch.zeros(1, 3, 8)) == taken
