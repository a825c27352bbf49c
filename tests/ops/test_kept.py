"""What the delta rule's forward keeps is handed to its backward, and nothing is kept where no gradient will be asked for."""

from types import SimpleNamespace

import pytest
import torch

from loglinear.ops import registration


@pytest.fixture
def calls(monkeypatch):
    """Kernels that return sums and say how they were called."""
    seen = []

    def forward(q, k, v, g, *rest):
        seen.append("forward")
        return v * 1

    def forward_keeping(q, k, v, g, *rest):
        seen.append("keeping")
        return v * 1, q + 1, k + 2

    def backward(do, *inputs, kept=(), **continued):
        seen.append([x.clone() for x in kept])
        return [None if x is None else do.sum() * torch.ones_like(x) for x in inputs[: 6 if len(inputs) == 8 else 5]]

    module = SimpleNamespace(forward=forward, forward_keeping=forward_keeping, backward=backward)
    monkeypatch.setattr(registration, "kernels_of", lambda delta: module)
    return seen


def inputs(delta: bool, grad: bool = True) -> list:
    def normal(*size):
        return torch.randn(1, 3, *size, requires_grad=grad)

    return [normal(1, 4), normal(1, 4), normal(2, 4), normal(2), normal(2) if delta else None, normal(2, 5), 1.0, None]


def test_kept_tensors_reach_the_backward(calls):
    x = inputs(delta=True)
    registration.run_eager(*x).sum().backward()
    assert calls[0] == "keeping"
    assert torch.equal(calls[1][0], x[0] + 1)
    assert torch.equal(calls[1][1], x[1] + 2)
    assert all(y.grad.shape == y.shape for y in x[:6])


def test_a_graph_that_is_retained_keeps_them(calls):
    x = inputs(delta=True)
    o = registration.run_eager(*x).sum()
    first, second = (torch.autograd.grad(o, x[:6], retain_graph=True) for _ in range(2))
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(calls[1], calls[2]))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_checkpointing_makes_them_again(calls):
    """The first pass may keep what it likes: it is dropped with the other saved tensors, and the second makes it again."""
    x = inputs(delta=True)
    torch.utils.checkpoint.checkpoint(registration.run_eager, *x, use_reentrant=False).sum().backward()
    assert calls[:2] == ["keeping", "keeping"]
    assert len(calls[2]) == 2


@pytest.mark.parametrize("what", ["no_grad", "no input needs one", "scalar gate"])
def test_without_a_gradient_nothing_is_kept(calls, what):
    x = inputs(delta=what != "scalar gate", grad=what != "no input needs one")
    if what == "no_grad":
        with torch.no_grad():
            registration.run_eager(*x)
    else:
        o = registration.run_eager(*x)
        if what == "scalar gate":
            o.sum().backward()
            assert calls.pop() == []
    assert calls == ["forward"]
