"""Steps of the mixers through fused kernels, and what stands beside them, against the plain layers in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import BFLOAT16, FLOAT32, INTERPRETED, LOW_PRECISION_FACTOR, relative

from loglinear import layers
from loglinear.kernels.decoding import inputs
from loglinear.layers.pages import PageLayout
from loglinear.ops import fused

HIDDEN = 24
SIZES = {  # one block of channels is not enough, and the last is partial
    "mamba2": {"num_heads": 4, "head_dim": 8, "state_size": 24, "num_groups": 2, "conv_width": 4},
    "gated_deltanet": {"num_heads": 4, "key_dim": 24, "value_dim": 16, "num_key_heads": 2, "conv_width": 3},
    "kda": {"num_heads": 2, "key_dim": 16, "value_dim": 24, "num_key_heads": 1, "conv_width": 3, "decay_bound": -5.0},
    "gla": {"num_heads": 2, "key_dim": 16, "value_dim": 8, "num_kv_heads": 1},
    "retnet": {"num_heads": 2, "key_dim": 16, "value_dim": 8, "num_kv_heads": 1},
}
KINDS = {"mamba2": layers.LogLinearMamba2, "gated_deltanet": layers.LogLinearGatedDeltaNet, "kda": layers.LogLinearKDA}
KINDS |= {"gla": layers.LogLinearGLA, "retnet": layers.LogLinearRetention, "lightning": layers.LogLinearRetention}
MIXERS = [f"{prefix}{name}" for name in SIZES for prefix in ("log_linear_", "")]
LIGHTNING = {"decays": "slopes", "rotary_base": None, "conv_activation": "silu", "gate_activation": "sigmoid"}
SIZES["log_linear_lightning"] = SIZES["retnet"] | LIGHTNING | {"num_kv_heads": None, "norm_per_head": False}
SIZES["doubled_gated_deltanet"] = SIZES["gated_deltanet"] | {"neg_eigval": True}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=["float32", "16 bits"])
CALLS = [3, 1] if INTERPRETED else [1, 3, 1]


@pytest.fixture(autouse=True)
def few_numbers(monkeypatch, steps_on_the_kernels):
    """Blocks of few numbers, so that there are several; no gradients."""
    monkeypatch.setattr(inputs, "BLOCK", 64)
    with torch.no_grad():
        yield


def make(name, device, dtype):
    torch.manual_seed(0)
    kind = next(kind for key, kind in KINDS.items() if name.endswith(key))
    options = (SIZES.get(name) or SIZES[name.removeprefix("log_linear_")]) | {
        "log_linear": name.startswith("log_linear_")
    }
    options["level_scale_start"] = "one"  # an offset that a kernel might forget
    mixer = kind(HIDDEN, num_levels=5, norm_eps=0.1, **options)  # a norm of next to nothing would be one of roundings
    for parameter in mixer.parameters():  # none is 0 or 1 throughout
        parameter += 0.3 * torch.randn_like(parameter)
    return mixer.to(device, dtype)


def walk(mixer, hidden, lengths):
    """Outputs of short calls after a prompt of ``lengths[b]`` tokens in row b, and the state after them."""
    dtype = mixer.out_proj.weight.dtype
    rows = [x[None, :length] for x, length in zip(hidden, lengths)]
    bounds = torch.tensor([0, *lengths], device=hidden.device).cumsum(0)
    state = mixer(torch.cat(rows, 1).to(dtype), output_state=True, cu_seqlens=bounds)[1].for_decoding(300)
    where, got, done = [x.data_ptr() for x in state._tensors()], [], 0
    for count in CALLS:
        piece = torch.stack([x[length + done : length + done + count] for x, length in zip(hidden, lengths)])
        y, after = mixer(piece.to(dtype), state, output_state=True)
        assert after is state
        got.append(y.double())
        done += count
    assert [x.data_ptr() for x in state._tensors()] == where
    return torch.cat(got, 1), state


CASES = list(product([*MIXERS, "doubled_gated_deltanet", "log_linear_lightning"], [torch.float32]))
CASES += product(MIXERS[: 4 if INTERPRETED else None : 2], [BFLOAT16])


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_steps_of_a_mixer(device, name, dtype, monkeypatch):
    """Rows at positions of their own, one of which closes a chunk; one token, and several."""
    lengths, used = [5, 62] if INTERPRETED else [5, 61, 17], []
    mixer = make(name, device, dtype)
    hidden = torch.randn(len(lengths), max(lengths) + sum(CALLS), HIDDEN, device=device).to(dtype)
    run = fused.step_inputs
    monkeypatch.setattr(fused, "step_inputs", lambda *args: used.append(args[0].shape[1]) or run(*args))
    got, state = walk(mixer, hidden, lengths)
    assert used == [count for count in CALLS if count == 1 or name.startswith("log_linear_")]
    monkeypatch.setattr(fused, "fits", lambda x, *others: False)
    plain, plain_state = walk(mixer, hidden, lengths)
    want, _ = walk(copy.deepcopy(mixer).double(), hidden, lengths)
    bar = FLOAT32 if dtype == torch.float32 else LOW_PRECISION_FACTOR * relative(plain, want)
    assert relative(got, want) <= bar
    assert torch.equal(state.position, plain_state.position)
    assert state.position.tolist() == [length + sum(CALLS) for length in lengths]
    torch.testing.assert_close(state.conv, plain_state.conv)  # copied, from products that may differ with the call


@pytest.mark.parametrize("name", ["log_linear_mamba2", "log_linear_kda", "gated_deltanet"])
def test_steps_of_a_mixer_on_pages(device, name):
    """Rows of a batch in pages of another order: the same as side by side, and other pages stay as they are."""
    mixer, index = make(name, device, torch.float32), torch.tensor([3, 1], device=device)
    hidden = torch.randn(2, 7, HIDDEN, device=device)
    state = mixer(hidden[:, :5], output_state=True)[1].for_decoding(300)
    layout = PageLayout.of_state(state)
    memory = torch.full((4, layout.nbytes + 48), -1, dtype=torch.int8, device=device)
    view = layout.view(memory)
    for own, x in zip(view._tensors(), state._tensors()):
        own[index] = x.to(own.dtype)
    for t in (5, 6):
        tokens = hidden[:, t : t + 1]
        assert relative(mixer(tokens, replace(view, rows=index))[0], mixer(tokens, state)[0]) <= FLOAT32
    assert torch.equal(view.position[index].long(), state.position)
    assert torch.equal(view.conv[index], state.conv)
    assert (memory[[0, 2]] == -1).all()


@pytest.mark.parametrize(("width", "T"), [(1, 2), (2, 1), (4, 2), (4, 3), (7, 9)])
def test_the_convolution_and_its_tail(device, width, T):
    """Fewer tokens than the tail holds, as many, and more; 70 channels behind 3 columns that are not its own."""
    torch.manual_seed(0)
    conv = layers.ShortConvolution(70, width).to(device)
    torch.nn.init.normal_(conv.bias)
    projected, tail = torch.randn(2, T, 80, device=device), torch.randn(2, width - 1, 70, device=device)
    want, after = copy.deepcopy(conv).double()(projected[..., 3:73].double(), tail.double())
    rates = torch.zeros(7, device=device)
    got = inputs.step_inputs(projected, None, tail, conv.weight, conv.bias, rates, rates, None, (3, 73, -1, 0))
    assert relative(got[0], want) <= 1e-6
    assert torch.equal(tail.double(), after)
    assert got[1] is got[3] is got[4] is None


def test_level_weights_from_rows_that_are_padded(device):
    """As a projection of an odd width leaves them: the first columns of wider rows (layers/linear.py)."""
    torch.manual_seed(0)
    projected, rates = torch.randn(2, 3, 8, device=device), torch.zeros(2, device=device)
    tail, weight = torch.randn(2, 1, 6, device=device), torch.randn(6, 2, device=device)
    wider, L = torch.randn(2, 3, 16, device=device), torch.randn(2, 5, device=device)
    given = (tail, weight, None, rates, rates, L, (0, 6, -1, 0))
    want = F.softplus(L * wider[..., :10].unflatten(-1, (2, 5)))
    assert relative(inputs.step_inputs(projected, wider[..., :10], *given)[4], want) <= 1e-6


def test_gates_of_any_size(device):
    """Time steps, decays, β and λ from where their exponentials vanish to where they are all there is."""
    size = torch.tensor([-float("inf"), -100, -30, -17, -7, -1, 0, 1e-3, 2, 19, 21, 80], device=device)
    heads = len(size)
    tail, weight = torch.randn(1, 3, heads, device=device), torch.randn(heads, 4, device=device)
    x, bias = torch.randn(heads, device=device), torch.zeros(heads, device=device)
    projected = torch.cat([x, size, size.clamp(min=-80)])[None, None]
    speed = torch.linspace(-3, 3, heads, device=device)
    factor = torch.tensor([1.0, -1.0, 0.5], device=device).expand(heads, 3).contiguous()
    dl = size.clamp(min=-200).repeat_interleave(3)[None, None]
    columns = (0, heads, 2 * heads, heads)
    mixed, v, g, beta, scales = inputs.step_inputs(projected, dl, tail, weight, None, bias, speed, factor, columns)
    steps = F.softplus(size.double())
    want = (
        (v, mixed.double() * steps),
        (g, -speed.double().exp() * steps),
        (beta, size.clamp(min=-80).double().sigmoid()),
        (scales, F.softplus(factor.double() * dl.double().view(heads, 3))[None, None]),
    )
    for one, other in want:
        torch.testing.assert_close(one.double(), other.expand_as(one), rtol=1e-5, atol=1e-37)


@DTYPES
def test_a_sum_and_its_norm(device, dtype):
    torch.manual_seed(0)
    norm = layers.SumRMSNorm(70).to(device, dtype)
    torch.nn.init.normal_(norm.weight)
    x, added = (torch.randn(2, 3, 70, device=device).to(dtype) for _ in range(2))
    total, normed = norm(x, added)
    assert torch.equal(total, x + added)
    want = F.rms_norm(total.double(), (70,), norm.weight.double(), 1e-6)
    assert relative(normed, want) <= (1e-6 if dtype == torch.float32 else 4e-3)
    assert norm(x.double(), added)[0].dtype == torch.float64  # not of one dtype: the plain lines


@DTYPES
def test_the_gate_of_swiglu(device, dtype):
    gate, x = (3 * torch.randn(2, 700, device=device).to(dtype) for _ in range(2))
    want = F.silu(gate.double()) * x.double()
    assert relative(fused.silu_times(gate, x), want) <= (1e-6 if dtype == torch.float32 else 8e-3)
