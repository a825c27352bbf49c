"""The short convolution's kernels against the plain layer in float64: outputs, tails and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
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


def with_values(x, step, skip_scale, weight, bias, lengths):
    """(x's part of the output with its skip, values, the two parts behind x) in plain PyTorch."""
    columns = weight.shape[1]
    outputs = []
    for part in x.split(lengths, 1):
        padded = F.pad(part.mT, (columns - 1, 0))
        outputs.append(F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=weight.shape[0])).mT)
    y = torch.cat(outputs, 1)
    inner = y.shape[2] - 2 * KEYS
    heads = y[..., :inner].unflatten(2, (step.shape[2], -1))
    skip = (heads * skip_scale[:, None]).flatten(2)
    return y, (heads * step[..., None]).to(x.dtype), skip, y[..., inner : inner + KEYS], y[..., inner + KEYS :]


KEYS = 8 if INTERPRETED else 128  # of each of the two parts behind x
VALUES = {  # length, heads, columns, taps: whole programs; sequences begin in a program; parts of programs; packed sequences
    "whole": (16, 4, 4, 4) if INTERPRETED else (384, 4, 64, 4),
    "within": (8, 4, 4, 3) if INTERPRETED else (72, 4, 64, 3),
    "parts": (11, 3, 6, 4) if INTERPRETED else (301, 5, 24, 4),
    "packed": (40, 3, 6, 4) if INTERPRETED else (700, 3, 64, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", VALUES)
def test_values(device, kind, dtype, monkeypatch):
    """The first channels times the steps of their heads, and all gradients, against float64."""
    if INTERPRETED:
        monkeypatch.setattr(kernels, "CHANNELS", 8)
        monkeypatch.setattr(kernels, "SPAN", 8 if kind != "within" else 16)
    length, heads, columns, taps = VALUES[kind]
    rows, place, lengths = (1 if kind == "packed" else 2), None, [length]
    if kind == "packed":
        lengths = [1, 2, 17, length - 20]
        place = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]).to(device)
    torch.manual_seed(0)
    channels = heads * columns + 2 * KEYS
    x = torch.randn(rows, length, channels + 16, device=device).to(dtype)[..., 16:]
    given = [x, torch.rand(rows, length, heads, device=device), torch.randn(heads, device=device)]
    given += [torch.randn(channels, taps, device=device), torch.randn(channels, device=device)]
    exact = [y.double().requires_grad_() for y in given]
    want = with_values(*exact, lengths)
    gradients = [torch.randn(y.shape, device=device).to(dtype) for y in want[1:]]
    wanted = torch.autograd.grad(want[1:], exact, [y.double() for y in gradients])
    x, step, scale, weight, bias = given
    y, v = kernels.with_values(x, weight, bias, place, step, columns)
    dv, dskip, dfirst, dsecond = gradients
    into = torch.full((rows, length, channels + 32), float("nan"), device=device, dtype=dtype)
    parts = [part.unflatten(2, (1, -1)) for part in (dfirst, dsecond)]
    columns_of = into[..., 16:-16]
    dstep, dweight, dbias = kernels.backward_with_values(
        dv, dskip, *parts, x, weight, bias, place, step, scale, columns_of
    )
    assert into[..., :16].isnan().all()
    assert into[..., -16:].isnan().all()
    bar = 1e-6 if dtype == torch.float32 else 4e-3
    found = {"y": (y, want[0]), "v": (v, want[1]), "dx": (columns_of, wanted[0]), "dstep": (dstep, wanted[1])}
    found |= {"dweight": (dweight, wanted[3]), "dbias": (dbias, wanted[4])}
    for name, (a, b) in found.items():
        assert (a.double() - b).norm() <= bar * b.norm(), name
