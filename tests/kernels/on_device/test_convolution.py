"""The short convolution's kernels against the plain layer in float64: outputs, tails and gradients."""

from __future__ import annotations

import pytest
import torch
from cases import INTERPRETED

from loglinear.kernels.pointwise import convolution as kernels
from loglinear.layers import ShortConvolution
from loglinear.ops import convolution

T = 24 if INTERPRETED else 1000  # sequences begin where a program loads; one token less, and they do not


@pytest.fixture(autouse=True)
def on_the_kernels(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(convolution, "has_kernel", lambda x, weight: x.dtype != torch.float64)
        monkeypatch.setattr(kernels, "SPAN", 8)


def run(conv, x, cu_seqlens, gradient):
    """y, tail and gradients of x, weight and bias."""
    y, tail = conv(x, None, cu_seqlens)
    wanted = [p for p in (x, conv.weight, conv.bias) if p is not None]
    loss = (y * gradient).sum() + tail.square().sum()
    return [y, tail, *torch.autograd.grad(loss, wanted)]


def compare(device, width, channels, dtype, lengths=None, bias=True, length=T):
    torch.manual_seed(0)
    conv = ShortConvolution(channels, width, bias).to(device)
    if bias:
        torch.nn.init.normal_(conv.bias)
    rows, cu_seqlens = 3, None
    if lengths is not None:
        rows, cu_seqlens = 1, torch.tensor([0, *lengths], device=device, dtype=torch.int32).cumsum(0)
    length = length if lengths is None else sum(lengths)
    # A part of a wider projection, as in the layers: rows do not touch each other.
    whole = torch.randn(rows, length, channels + 9, device=device).to(dtype)
    x = whole[..., 4 : 4 + channels].detach().requires_grad_()
    gradient = torch.randn(rows, length, channels, device=device).to(dtype)
    used = []
    kernel = convolution.convolve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "convolve", lambda *inputs: used.append(True) or kernel(*inputs))
        got = run(conv, x, cu_seqlens, gradient)
    assert used
    wide = ShortConvolution(channels, width, bias).to(device).double()
    wide.load_state_dict(conv.state_dict())
    want = run(wide, x.detach().double().requires_grad_(), cu_seqlens, gradient.double())
    bar = 1e-6 if dtype == torch.float32 else 4e-3  # a result is rounded once, to 8 bits: 2^-9 at most
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= bar * b.norm()


@pytest.mark.parametrize(("width", "channels"), [(1, 5), (2, 64), (4, 70), (7, 5)])
def test_rows(device, width, channels):
    compare(device, width, channels, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_sequences(device, dtype):
    """Sequences of no, one and a few tokens, and one longer than a program's tokens."""
    compare(device, 4, 70, dtype, lengths=(2, 0, 1, 3, 70 if INTERPRETED else 3000, 5), bias=False)


def test_low_precision(device):
    compare(device, 4, 70, torch.bfloat16, length=T - 1)


@pytest.mark.parametrize("packed", [False, True])
def test_the_operator_is_what_it_says(device, packed):
    conv, x = ShortConvolution(20).to(device), torch.randn(1, 50, 20, device=device, requires_grad=True)
    place = torch.arange(50, device=device, dtype=torch.int32) if packed else None
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(convolution.convolve.operator, (x, conv.weight, conv.bias, place), test_utils=tests)


def test_fewer_tokens_than_taps(device):
    conv = ShortConvolution(5).to(device)
    for length in (0, 1, 2):
        x = torch.randn(2, length, 5, device=device)
        y, tail = conv(x)
        want, after = conv(x, torch.zeros(2, 3, 5, device=device))
        torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
        assert torch.equal(tail, after)


def test_a_tail_holds_nothing_of_the_sequence_before(device):
    x = torch.randn(1, 6, 5, device=device)
    x[:, :5] = float("nan")
    tail = ShortConvolution(5).to(device)(x, None, torch.tensor([0, 5, 6], device=device))[1]
    assert torch.equal(tail[1, -1], x[0, -1])
    assert torch.equal(tail[1, :-1], torch.zeros(2, 5, device=device))
