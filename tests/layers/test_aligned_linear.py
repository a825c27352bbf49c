"""AlignedLinear is nn.Linear, whichever way its product is taken."""

import torch
import torch.nn.functional as F

from loglinear.layers import linear
from loglinear.layers.linear import AlignedLinear, aligned_product


def test_the_padded_product_and_its_gradients_are_those_of_a_linear_layer():
    x, weight = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(21, 5, dtype=torch.float64)
    results = []
    for product in (aligned_product, F.linear):
        leaves = [y.clone().requires_grad_() for y in (x, weight)]
        out = product(*leaves)
        (out.square() * torch.arange(21)).sum().backward()
        results.append([out, *(y.grad for y in leaves)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)
    assert results[0][0].stride(-2) == 32


def test_few_tokens_and_the_cpu_take_the_weight_as_it_is(monkeypatch):
    """A padded copy of the weight would double what a decoding step reads."""
    taken = []
    monkeypatch.setattr(
        linear, "aligned_product", lambda input, weight: taken.append(input.shape) or F.linear(input, weight)
    )
    layer = AlignedLinear(3, 7)
    many = torch.zeros(linear.FEW + 1, 3)
    layer(many)
    assert not taken
    cuda = type("OnCuda", (torch.Tensor,), {"is_cuda": True})
    layer(many[:-1].as_subclass(cuda))
    assert not taken
    layer(many.as_subclass(cuda))
    assert taken == [many.shape]
