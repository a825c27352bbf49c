"""The ops over several ranks against the same op in one process: outputs, and the gradients of every input on every rank.

Decays and writing strengths are small, or little of a rank's past would be left for an error to show in.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks

import loglinear
from loglinear.distributed import context, context_parallel_attention, context_parallel_delta_rule, context_span
from oracle import error, make_inputs

SMALL = dict(B=2, H=4, G=2, K=3, V=5, L=11)
CASES = {  # ranks, tokens of all together, inputs, options of the op
    "scalar": (3, 576, dict(gate="scalar", **SMALL), {"scale": 0.7}),  # spans of 3 chunks: two or more blocks
    "delta rule": (3, 576, dict(gate="delta", **SMALL), {"scale": 0.7, "use_qk_l2norm_in_kernel": True}),
    "channels": (3, 576, dict(gate="diagonal", **SMALL), {"scale": 0.7}),
    "channels, delta rule": (2, 256, dict(gate="diagonal delta", **SMALL), {}),
    "two ranks": (2, 256, dict(gate="delta", **SMALL), {}),
    "eight ranks": (8, 1024, dict(gate="scalar", **SMALL), {}),
    "eight ranks, channels, delta rule": (8, 512, dict(gate="diagonal delta", **SMALL), {}),
    "no gate, few levels": (3, 192, dict(gate="identity", **SMALL | {"L": 8}), {}),
    "linear": (3, 192, dict(gate="scalar", **SMALL), {}),
    "linear delta rule": (2, 128, dict(gate="delta", **SMALL), {}),
    "resets": (2, 256, dict(gate="scalar", **SMALL), {}),
    "float32": (2, 256, dict(gate="delta", dtype=torch.float32, **SMALL), {}),
    "bfloat16": (3, 192, dict(gate="scalar", dtype=torch.bfloat16, **SMALL), {}),
}
BLOCKS = {1: 1, 2: 1, 3: 2}  # blocks of spans of so many chunks: those of 3 are 2 + 1, or 1 + 2
# Above the dtype's rounding by what sums in another order lose; bfloat16 as one process with the same dtype, twice.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def made(name: str) -> dict:
    """Inputs of the whole sequence."""
    _, length, kind, _ = CASES[name]
    x = make_inputs(T=length, **kind)
    for weak in {"g", "beta"} & set(x):
        x[weak] = x[weak] / 50
    if "linear" in name:
        del x["level_scales"]
    if name == "resets":
        x["g"][:, [0, 5, 63, 64, 127, 140]] = -torch.inf
        x["g"][:, 70:73] = -1e30
    return {key: value.requires_grad_() for key, value in x.items()}


def call(x: dict, ops: tuple, **options) -> torch.Tensor:
    """o of the scalar gate's or the delta rule's function of ``ops``."""
    result = ops["beta" in x](**{"g": None, "level_scales": None, **x}, **options)
    return result[0] if isinstance(result, tuple) else result


def weight(o: torch.Tensor) -> torch.Tensor:
    return torch.randn(o.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(o.dtype)


def one_rank(rank: int) -> dict:
    dist.init_process_group("gloo")
    groups = {8: dist.group.WORLD, **{count: dist.new_group(range(count)) for count in (2, 3)}}
    found = {name: case(name, groups[ranks]) for name, (ranks, *_) in CASES.items() if ranks > rank}
    if rank < 3:
        found["errors"] = [error_of(64 * (rank + 1), groups[3]), error_of(65, groups[3]), span_error(400, groups[3])]
    return found


def error_of(length: int, group) -> str:
    x = make_inputs(T=length, **SMALL)
    with pytest.raises(ValueError) as caught:
        call(x, (context_parallel_attention,), group=group)
    return str(caught.value)


def span_error(length: int, group) -> str:
    with pytest.raises(ValueError) as caught:
        context_span(length, group)
    return str(caught.value)


def case(name: str, group) -> list:
    """o of this rank, the gradients of its inputs, and how many numbers it sent."""
    whole, (_, length, _, options) = made(name), CASES[name]
    own = context_span(length, group)
    x = {key: value[:, own].detach().requires_grad_() for key, value in whole.items()}
    sent, exchange = [], context.exchange

    def counted(through, given, group):
        sent.append(given.numel())
        return exchange(through, given, group)

    context.exchange = counted
    o = call(x, (context_parallel_attention, context_parallel_delta_rule), **options, group=group)
    context.exchange = exchange
    full = torch.zeros(whole["v"].shape, dtype=o.dtype)
    return [o, *torch.autograd.grad(o, list(x.values()), weight(full)[:, own]), sum(sent)]


@pytest.fixture(scope="module")
def found():
    return on_ranks(8, one_rank)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_one_process(found, name):
    ranks, _, _, options = CASES[name]
    x = made(name)
    o = call(x, (loglinear.log_linear_attention, loglinear.log_linear_delta_rule), **options)
    expected = [o, *torch.autograd.grad(o, list(x.values()), weight(o))]
    for i, want in enumerate(expected):
        have = torch.cat([torch.as_tensor(result[name][i]) for result in found[:ranks]], 1)
        assert error(have, want) < TOLERANCE[want.dtype], ["o", *x][i]


@pytest.mark.parametrize("name", CASES)
def test_a_rank_sends_a_map_for_each_block(found, name):
    """docs/context_parallel.md: H (K V + 1) numbers a block; with channels H (K V + K), with a delta rule H (K V + K²)."""
    ranks, length, kind, _ = CASES[name]
    span = {"delta": kind["K"] ** 2, "diagonal delta": kind["K"] ** 2, "diagonal": kind["K"]}.get(kind["gate"], 1)
    blocks = 1 if "linear" in name else BLOCKS[length // ranks // 64]
    expected = kind["B"] * kind["H"] * (kind["K"] * kind["V"] + span) * blocks
    assert {result[name][-1] for result in found[:ranks]} == {expected}


def test_spans_that_do_not_fit_are_named(found):
    for result in found[:3]:
        unequal, ragged, whole = result["errors"]
        assert unequal == "q must hold as many tokens on every rank of the group: got T=[64, 128, 192]"
        assert ragged == "q must hold a multiple of 64 tokens on every rank: got T=65"
        assert whole == "length must be a multiple of 192 (3 ranks, chunks of 64 tokens): got 400"
