"""The compiled op of the delta rule: it keeps what eager calls keep, and its numbers are theirs bit for bit."""

from __future__ import annotations

import importlib

import cases
import pytest
import torch
from cases import DELTA, INTERPRETED
from torch.utils.checkpoint import checkpoint

from loglinear import log_linear_delta_rule

pytestmark = pytest.mark.usefixtures("on_the_kernels")
HEADS = 1 if INTERPRETED else 2
LENGTHS = (30, 60) if INTERPRETED else (300, 700, 1900)  # of one tier of the tree, and of two
KEPT = 6 if INTERPRETED else 8  # tensors


@pytest.fixture(autouse=True)
def poisoned_scratch():
    """Plain memory here: the compiler checks storage offsets, and a guard band is one."""


@pytest.fixture
def backwards(monkeypatch):
    """The number of tensors that each call of the backward kernels was handed from a forward."""
    module = importlib.import_module("loglinear.kernels.delta")
    backward, seen = module.backward, []

    def spy(*inputs, kept=(), **options):
        seen.append(len(kept))
        return backward(*inputs, kept=kept, **options)

    monkeypatch.setattr(module, "backward", spy)
    return seen


def make(device, T: int, B: int = 1) -> list[torch.Tensor]:
    """q, k, v, g, β and λ in float32."""
    x = cases.make(device, DELTA, B=B, T=T, H=HEADS, G=HEADS, L=9, seed=T)
    return [y.requires_grad_() for y in x.values()]


def op(*inputs, **options) -> torch.Tensor:
    return log_linear_delta_rule(*inputs, **options)[0]


def gradients(function, inputs, **options) -> list[torch.Tensor]:
    o = function(*inputs, **options)
    do = torch.randn(o.shape, generator=torch.Generator("cpu").manual_seed(9)).to(o)
    return [o, *torch.autograd.grad(o, inputs, do)]


def same(got, want) -> bool:
    return all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_compiled_keeps_what_eager_keeps(device, compiled, backwards, monkeypatch):
    """Packed, with an empty sequence; what comes before the op and after it is compiled with it."""
    if INTERPRETED:  # so few tokens keep nothing else
        monkeypatch.setattr(importlib.import_module("loglinear.kernels.delta.memory"), "KEPT_SHARE", 9.0)

    def block(q, *rest):
        return 2 * op(q * 0.5, *rest, cu_seqlens=bounds)

    T = LENGTHS[0] + 10
    bounds = torch.tensor([0, 5, 5, T], device=device)
    inputs = make(device, T)
    assert same(gradients(compiled(block), inputs), gradients(block, inputs))
    assert backwards == [KEPT, KEPT]


def test_one_graph_for_every_length_of_as_many_tiers(device, compiled, backwards):
    function = compiled(op, dynamic=True)
    for i, T in enumerate(LENGTHS):
        inputs = make(device, T, B=2)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = gradients(function, inputs)
        assert same(got, gradients(op, inputs))
    assert set(backwards) == {KEPT}


def test_checkpointing_in_the_graph_makes_them_again(device, compiled, backwards):
    def block(*inputs):
        return 2 * checkpoint(op, *inputs, use_reentrant=False)

    inputs = make(device, LENGTHS[0])
    assert same(gradients(compiled(block), inputs), gradients(block, inputs))
    assert backwards == [KEPT, KEPT]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # PyTorch's own first graph, where its memory pool begins
def test_compiled_into_cuda_graphs(device, compiled, backwards):
    """What is kept lies in the memory of the graphs from the forward's to the backward's, with new inputs every time."""
    function = compiled(op, mode="reduce-overhead")
    inputs = make(device, LENGTHS[0])
    for seed in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            inputs[2].copy_(torch.randn(inputs[2].shape, generator=torch.Generator("cpu").manual_seed(seed)))
        got = [x.clone() for x in gradients(function, inputs)]
        assert same(got, gradients(op, inputs))
    assert set(backwards) == {KEPT}


def rest(keep: str) -> tuple:
    """Arguments of the operator behind its inputs: cu_seqlens, first_chunks, scale, reach, keep, backend."""
    return None, None, 1.0, 0, keep, "auto"


def test_opcheck(device):
    """Above all, that shapes and dtypes of what is kept are those that the compiler was told.

    Without the schema check of the forward, which compares all outputs of two runs: entries that no query reads are undefined.
    """
    inputs = make(device, LENGTHS[0])
    kept = torch.ops.loglinear.attention(*inputs, *rest("maps"))[1:]
    assert len(kept) == KEPT
    assert len(torch.ops.loglinear.attention(*inputs, *rest(""))) == 1
    assert len(torch.ops.loglinear.attention(*make(device, 3), *rest("maps"))) == 1, "maps of three tokens do not fit"
    forward = *inputs, *rest("maps")
    tests = ["test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(torch.ops.loglinear.attention.default, forward, test_utils=tests)
    values = [x.detach() for x in inputs]
    backward = torch.randn_like(values[2]), *values, *rest("maps"), [x.detach() for x in kept]
    tests = ["test_schema", "test_faketensor"]
    torch.library.opcheck(torch.ops.loglinear.attention_backward.default, backward, test_utils=tests)
