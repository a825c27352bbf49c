"""The public op where it runs the kernels: what PyTorch does around it changes no number."""

import pytest
import torch

from loglinear import log_linear_attention
from loglinear.ops import registration

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = ((2, 300, 1, 16), (2, 300, 1, 16), (2, 300, 2, 16), (2, 300, 2), (2, 300, 2, 10))


@pytest.fixture(autouse=True)
def poisoned_scratch():
    """Plain memory here: opcheck compares storage offsets, and a guard band is one."""


def make(dtype=torch.float32, requires_grad=True):
    q, k, v, g, scales = (torch.randn(shape, device="cuda") for shape in SHAPES)
    inputs = [q.to(dtype), k.to(dtype), v.to(dtype), -g.abs() / 10, scales]
    return [x.requires_grad_(requires_grad) for x in inputs]


def op(*inputs):
    return log_linear_attention(*inputs)[0]


def gradients(function, inputs, gradient):
    o = function(*inputs)
    return [o, *torch.autograd.grad(o, inputs, gradient)]


def test_equals_the_definition_and_takes_the_kernel():
    inputs = make()
    assert registration.has_kernel(inputs[0], inputs[2], None, inputs[4])
    gradient = torch.randn_like(inputs[2])
    wide = [x.detach().double().requires_grad_() for x in inputs]
    for got, want in zip(gradients(op, inputs, gradient), gradients(op, wide, gradient.double())):
        assert (got.double() - want).norm() / want.norm() < 1e-5


def test_states_agree_with_the_kernel():
    inputs = make(requires_grad=False)
    whole = op(*inputs)
    first, state = log_linear_attention(*(x[:, :170] for x in inputs), output_final_state=True)
    rest, _ = log_linear_attention(*(x[:, 170:] for x in inputs), initial_state=state, output_final_state=True)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    inputs = make()
    gradient = torch.randn_like(inputs[2])
    compiled = torch.compile(op, fullgraph=True, dynamic=dynamic)
    for got, want in zip(gradients(compiled, inputs, gradient), gradients(op, inputs, gradient)):
        assert torch.equal(got, want)


def test_opcheck():
    q, k, v, g, scales = make()
    torch.library.opcheck(torch.ops.loglinear.attention.default, (q, k, v, g, None, scales, 1.0, None))


def test_autocast_equals_explicit_cast():
    inputs = make(requires_grad=False)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = op(*inputs)
    assert torch.equal(got, op(*(x.bfloat16() for x in inputs[:3]), *inputs[3:]))


def test_checkpoint_and_retained_graph():
    inputs = make()
    gradient = torch.randn_like(inputs[2])
    want = gradients(op, inputs, gradient)
    o = torch.utils.checkpoint.checkpoint(op, *inputs, use_reentrant=False)
    for got, expected in zip(torch.autograd.grad(o, inputs, gradient), want[1:]):
        assert torch.equal(got, expected)
    o = op(*inputs)
    first, second = (torch.autograd.grad(o, inputs, gradient, retain_graph=True) for _ in range(2))
    for a, b, expected in zip(first, second, want[1:]):
        assert torch.equal(a, expected)
        assert torch.equal(b, expected)


def test_cuda_graph_of_forward_and_backward():
    inputs = make(torch.bfloat16)
    gradient = torch.randn_like(inputs[2])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            gradients(op, inputs, gradient)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(op, inputs, gradient)
    with torch.no_grad():
        for x in inputs[:3]:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for got, want in zip(captured, gradients(op, inputs, gradient)):
        assert torch.equal(got, want)
