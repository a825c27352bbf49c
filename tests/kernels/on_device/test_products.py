"""Products of a few rows with what stands between them, against float64, and a layer of them against its plain lines."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import BFLOAT16, FLOAT32, LOW_PRECISION_FACTOR, relative

from loglinear.kernels.matvec import products

EPS = 0.01
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=["float32", "16 bits"])


def make(device, dtype, B, K, N, M):
    """x, two weights of K columns, one of N rows and one of M, a norm's weight and a residual stream."""
    generator = torch.Generator("cpu").manual_seed(0)
    sizes = (B, 1, K), (N, K), (M, K), (K,), (B, 1, N)
    given = [torch.randn(size, generator=generator) for size in sizes]
    given[1], given[2] = given[1] / K**0.5, given[2] / K**0.5
    return [x.to(device, dtype) for x in given]


def check(got, want, plain):
    """At most twice the error of plain code at that dtype."""
    bar = FLOAT32 if got.dtype == torch.float32 else LOW_PRECISION_FACTOR * relative(plain, want)
    assert got.isfinite().all()
    assert relative(got, want) <= bar


@DTYPES
@pytest.mark.parametrize(("B", "K"), [(1, 600), (3, 70)])  # two blocks of columns, and less than one
def test_products_of_a_norm(device, dtype, B, K):
    """Two weights of one input; neither has a whole number of programs."""
    x, first, second, weight, _ = make(device, dtype, B, K, 19, 5)
    got = products(x, first, second, weight, None, EPS)
    for y, one in zip(got, (first, second)):
        plain = F.linear(F.rms_norm(x, (K,), weight, EPS), one)
        check(y, F.linear(F.rms_norm(x.double(), (K,), weight.double(), EPS), one.double()), plain)


@DTYPES
@pytest.mark.parametrize("normed", [False, True])
def test_a_product_on_the_residual_stream(device, dtype, normed):
    """With a norm before it, it also counts the tokens: here two of each of two rows."""
    x, weight, _, scale, added = make(device, dtype, 4, 70, 19, 1)
    position = torch.tensor([5, 70], device=device) if normed else None
    got, none = products(x.view(2, 2, 70), weight, None, scale if normed else None, added, EPS, position=position)
    assert none is None
    assert position is None or position.tolist() == [7, 72]

    def summed(x, weight, scale, added):
        return F.linear(F.rms_norm(x, (70,), scale, EPS) if normed else x, weight) + added

    want, plain = (summed(*(t.to(kind) for t in (x, weight, scale, added))) for kind in (torch.double, dtype))
    check(got.view_as(added), want, plain)


@DTYPES
def test_swiglu_of_a_norm(device, dtype):
    x, gate, up, weight, _ = make(device, dtype, 2, 70, 19, 19)
    got, none = products(x, gate, up, weight, None, EPS, gated=True)
    assert none is None

    def swiglu(x, weight, gate, up):
        normed = F.rms_norm(x, (70,), weight, EPS)
        return F.silu(F.linear(normed, gate)) * F.linear(normed, up)

    check(got, swiglu(*(t.double() for t in (x, weight, gate, up))), swiglu(x, weight, gate, up))


def test_a_row_does_not_depend_on_its_neighbours(device):
    """From two rows on."""
    x, gate, up, weight, _ = make(device, BFLOAT16, 3, 70, 19, 19)
    together, _ = products(x, gate, up, weight, None, EPS, gated=True)
    for two in ([0, 1], [2, 0]):
        assert torch.equal(products(x[two], gate, up, weight, None, EPS, gated=True)[0], together[two])
