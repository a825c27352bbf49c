"""The public ops where they run the kernels: what PyTorch does around them changes no number."""

import importlib

import cases
import pytest
import torch

from loglinear import log_linear_attention, log_linear_delta_rule
from loglinear.kernels.tree import replay
from loglinear.layers import ShortConvolution
from loglinear.ops.cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
rules = pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])


@pytest.fixture(autouse=True)
def poisoned_scratch():
    """Plain memory here: the compiler and opcheck compare storage offsets, and a guard band is one."""


def make(delta, dtype=torch.float32, T=300, H=2, G=1):
    """The arguments of either rule in their order."""
    seed = int(torch.randint(1000, ()))  # of other numbers at each call
    x = cases.make(DEVICE, cases.DELTA if delta else cases.DECAY, B=2, T=T, H=H, G=G, L=10, dtype=dtype, seed=seed)
    return [y.requires_grad_() for y in x.values()]


def op(*inputs):
    """o of the rule that takes so many arguments."""
    return (log_linear_delta_rule if len(inputs) == 6 else log_linear_attention)(*inputs)[0]


def gradients(function, inputs, gradient):
    o = function(*inputs)
    return [o, *torch.autograd.grad(o, inputs, gradient)]


@rules
def test_cuda_graph_of_forward_and_backward(delta):
    inputs = make(delta, torch.bfloat16)
    gradient = torch.randn_like(inputs[2])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            gradients(op, inputs, gradient)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Without its graph, which would tie the inputs to this stream.
        captured = [x.detach() for x in gradients(op, inputs, gradient)]
    with torch.no_grad():
        for x, other in zip(inputs, make(delta, torch.bfloat16)):
            x.copy_(other)
    graph.replay()
    for got, want in zip(captured, gradients(op, inputs, gradient)):
        assert want.isfinite().all()
        assert torch.equal(got, want)


@pytest.mark.parametrize(("H", "G"), [(4, 2), (3, 1), (2, 2)])
def test_slices_of_heads(monkeypatch, H, G):
    """Where the intermediates of all heads pass the allowance, the backward takes some at a time; no bit changes."""
    backward, memory = (importlib.import_module(f"loglinear.kernels.delta.{x}") for x in ("backward", "memory"))
    choose, chosen = backward.heads_at_a_time, []

    def heads_at_a_time(*sizes):
        chosen.append(choose(*sizes))
        return chosen[-1]

    monkeypatch.setattr(backward, "heads_at_a_time", heads_at_a_time)
    inputs = make(True, H=H, G=G)
    gradient = torch.randn_like(inputs[2])
    results = []
    for allowed in (memory.UNSLICED, 0):
        monkeypatch.setattr(memory, "UNSLICED", allowed)
        replay.plans_of.cache_clear()  # a recorded call would not look at the allowance again
        results.append(gradients(op, inputs, gradient))
    replay.plans_of.cache_clear()
    assert chosen[0] == H
    assert chosen[1] < H
    for whole, sliced in zip(*results):
        assert torch.equal(whole, sliced)


@pytest.mark.parametrize("packed", [False, True])
def test_convolution_as_an_operator(packed):
    conv = ShortConvolution(20).to(DEVICE)
    x, gradient = torch.randn(2, 1, 50, 20, device=DEVICE)
    x.requires_grad_()
    place = torch.arange(50, device=DEVICE, dtype=torch.int32) if packed else None
    torch.library.opcheck(torch.ops.loglinear.convolution.default, (x, conv.weight, conv.bias, place))
    bounds = torch.tensor([0, 3, 50], device=DEVICE) if packed else None

    def convolve(x, weight, bias):
        return torch.func.functional_call(conv, {"weight": weight, "bias": bias}, (x, None, bounds))[0]

    inputs = [x, conv.weight, conv.bias]
    want = gradients(convolve, inputs, gradient)
    torch._dynamo.reset()
    for got, expected in zip(gradients(torch.compile(convolve, fullgraph=True), inputs, gradient), want, strict=True):
        assert torch.equal(got, expected)


def test_linear_cross_entropy_as_an_operator():
    hidden, weight = torch.randn(70, 24, device=DEVICE), torch.randn(200, 24, device=DEVICE)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    targets = torch.randint(200, (70,), device=DEVICE)
    arguments = (*inputs, targets, -100, torch.bfloat16, True, True)
    torch.library.opcheck(torch.ops.loglinear.linear_cross_entropy.default, arguments)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        want = gradients(lambda *x: linear_cross_entropy(*x, targets), inputs, torch.ones((), device=DEVICE))
        torch._dynamo.reset()
        compiled = torch.compile(linear_cross_entropy, fullgraph=True)
        got = gradients(lambda *x: compiled(*x, targets), inputs, torch.ones((), device=DEVICE))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0)


def test_linear_cross_entropy_keeps_no_logits():
    """65,536 tokens and a vocabulary of 32,000 in bf16: 4 GB of logits, of which an eighth is ever there."""
    hidden = torch.randn(65536, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32000, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(32000, (65536,), device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < 512 << 20
