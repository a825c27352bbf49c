"""The public ops against the definition: every length, group, width, number of levels, gate and dtype, with gradients."""

import inspect

import pytest
import torch
from calls import C, assert_close, both_forms, both_rules, dense, fields, inputs, output, run

import loglinear
from oracle import TOLERANCES, error, gradients, oracle, oracle_row

GATES = ("identity", "scalar", "delta")
CHANNELS = ("diagonal", "diagonal delta")
gates = pytest.mark.parametrize("gate", GATES)
EXACT = TOLERANCES[torch.float64]


STATES = "initial_state output_final_state"
SIGNATURES = {
    loglinear.log_linear_attention: f"q k v g level_scales scale {STATES} cu_seqlens",
    loglinear.log_linear_delta_rule: f"q k v g beta level_scales scale {STATES} use_qk_l2norm_in_kernel cu_seqlens",
}


@pytest.mark.parametrize(("op", "names"), SIGNATURES.items())
def test_signature(op, names):
    """The field's names, in the field's order; anything more comes after them and is optional."""
    parameters = inspect.signature(op).parameters
    assert list(parameters)[: len(names.split())] == names.split()
    defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    required = ("q", "k", "v", "g", "beta", "level_scales")
    assert [name for name in parameters if name not in defaults] == [n for n in required if n in names.split()]
    assert defaults.pop("backend") == "auto"
    switches = ("output_final_state", "use_qk_l2norm_in_kernel")
    assert all(default is (False if name in switches else None) for name, default in defaults.items())
    assert op is getattr(loglinear.ops, op.__name__)


@pytest.mark.parametrize(
    ("gate", "hard"),
    [(gate, False) for gate in (*GATES, *CHANNELS)] + [(gate, True) for gate in (*GATES[1:], *CHANNELS)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_the_oracle(gate, hard, dtype):
    """Three chunks, groups, and (hard) gates of -inf and -1e30 at and around the chunk's border."""
    x = inputs(gate, hard=hard, T=150, dtype=dtype, grad=True)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    assert_close(x, output(x), oracle(**exact), TOLERANCES[dtype], exact)


@gates
@pytest.mark.parametrize(("K", "V"), [(1, 1), (7, 2), (2, 33), (64, 64), (256, 3)])
def test_every_width(gate, K, V):
    x = inputs(gate, B=1, T=2 * C + 2, K=K, V=V, grad=True)
    assert_close(x, output(x), dense(**x), EXACT)


@gates
@pytest.mark.parametrize("L", [1, 2, 6, 7, 8, 9, 10, 20])
def test_levels_beyond_the_last_share_it(gate, L):
    """T = 300 needs 10 levels; 7 lie within a chunk."""
    x = inputs(gate, B=1, T=300, L=L, grad=True)
    assert_close(x, output(x), dense(**x), EXACT)
    if L < 10:
        x = {name: tensor.detach() for name, tensor in x.items()}
        last = x["level_scales"][..., -1:].expand(-1, -1, -1, 10 - L)
        filled = {**x, "level_scales": torch.cat([x["level_scales"], last], -1)}
        assert torch.equal(output(x), output(filled))


@both_rules
@pytest.mark.parametrize("value", [-torch.inf, -3e38, -1e30, -1e4, -0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_gates(gate, value, dtype):
    """The sums overflow to -inf, or stay 0: the token alone is left, or nothing decays."""
    x = inputs(gate, B=1, T=2 * C + 5, dtype=dtype)
    x["g"] = torch.full_like(x["g"], value)
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    expected = dense(**exact)
    if value < 0:
        q, k = (exact[n].repeat_interleave(2, 2) for n in ("q", "k"))
        own = exact["level_scales"][..., 0] * (q * k).sum(-1) * exact.get("beta", torch.ones(1))
        assert error(expected, own[..., None] * exact["v"]) <= EXACT
    assert_close(x, output(x), expected, TOLERANCES[dtype], exact)


def test_no_gate_is_a_gate_of_zero():
    for gate in ("scalar", "delta"):
        x = inputs(gate, T=150)
        zero = {**x, "g": torch.zeros_like(x["g"])}
        assert torch.equal(output({**x, "g": None}), output(zero))


@gates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_only_the_output(gate, dtype):
    """Gates and λ in float32 beside narrow q, k and v, as models have them, and a scale: the bits of float32, rounded once."""
    x = inputs(gate, T=C + 9, dtype=torch.float32)
    narrow = {name: t.to(dtype) if name in ("q", "k", "v") else t for name, t in x.items()}
    wide = {name: t.float() for name, t in narrow.items()}
    assert torch.equal(output(narrow, scale=0.3), output(wide, scale=0.3).to(dtype))


@gates
@both_forms
def test_an_empty_batch_and_no_tokens(gate, linear):
    for B, T in ((0, 70), (2, 0), (0, 0)):
        x = inputs(gate, B=B, T=T, linear=linear, grad=True)
        o, state = run(x)
        assert o.shape == (B, T, 4, 5)
        assert state.position.tolist() == [0] * B
        assert all(tensor.eq(0).all() for tensor in fields(state).values())
        assert [tuple(x.shape) for x in gradients(o, x.values())] == [tuple(x.shape) for x in x.values()]


@both_rules
def test_a_long_sequence_row_by_row(gate):
    """T = 20,000 in float32: rows sampled at and around powers of two, each against its own O(T) sum."""
    T = 20_000
    x = inputs(gate, B=1, T=T, H=2, G=1, K=8, V=4, L=15, dtype=torch.float32)
    x["g"] = x["g"] * 0.005  # slow enough that the first tokens still reach the last
    o = output(x)[0]
    alone = {name: tensor[0] for name, tensor in x.items()}
    for t in (0, 8191, 8192, 12_345, 16_383, 16_384, T - 1):
        assert error(o[t], torch.from_numpy(oracle_row(t, **alone))) <= TOLERANCES[torch.float32], t
