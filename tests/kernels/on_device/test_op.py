"""The public ops in a CUDA graph, forward and backward."""

import cases
import pytest
import torch

from loglinear import log_linear_attention, log_linear_delta_rule

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
rules = pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])


@pytest.fixture(autouse=True)
def poisoned_scratch():
    """Plain memory here: what a graph captures has addresses of its own."""


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
