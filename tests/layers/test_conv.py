"""ShortConvolution against torch's Conv1d, one sequence at a time."""

import pytest
import torch
import torch.nn.functional as F

from loglinear.layers import ShortConvolution

CHANNELS = 5


@pytest.fixture(params=[1, 2, 4])
def conv(request):
    torch.manual_seed(0)
    module = ShortConvolution(CHANNELS, width=request.param).double()
    torch.nn.init.normal_(module.bias)
    return module


def oracle(conv, x):
    """torch's Conv1d on one sequence ``[1, T, channels]`` with W - 1 zeros before it."""
    padded = F.pad(x.transpose(1, 2), (conv.width - 1, 0))
    return F.silu(F.conv1d(padded, conv.weight.unsqueeze(1), conv.bias, groups=CHANNELS)).transpose(1, 2)


def test_equals_torch_conv1d(conv):
    x = torch.randn(3, 9, CHANNELS, dtype=torch.float64)
    torch.testing.assert_close(conv(x)[0], oracle(conv, x), rtol=0, atol=1e-12)


def test_continues_at_any_split(conv):
    x = torch.randn(2, 11, CHANNELS, dtype=torch.float64)
    pieces, tail = [], None
    for piece in x.split([1, 0, 2, 5, 1, 2], dim=1):
        y, tail = conv(piece, tail)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), oracle(conv, x), rtol=0, atol=1e-12)


def test_packed_sequences_cannot_see_each_other(conv):
    lengths = [4, 0, 1, 7]
    x = torch.randn(1, sum(lengths), CHANNELS, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    y, tail = conv(x, None, cu_seqlens)
    alone = [oracle(conv, piece) for piece in x.split(lengths, dim=1) if piece.shape[1]]
    torch.testing.assert_close(y, torch.cat(alone, dim=1), rtol=0, atol=1e-12)

    more = torch.randn(1, 9, CHANNELS, dtype=torch.float64)
    y, _ = conv(more, tail, torch.tensor([0, 3, 5, 5, 9], dtype=torch.int32))
    wholes = [torch.cat(pair, dim=1) for pair in zip(x.split(lengths, dim=1), more.split([3, 2, 0, 4], dim=1))]
    continued = [oracle(conv, whole)[:, length:] for whole, length in zip(wholes, lengths)]
    torch.testing.assert_close(y, torch.cat(continued, dim=1), rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_tail_in_place(conv):
    """One token at a time, several, and packed: the same tail, in the buffer that was given."""
    x = torch.randn(2, 11, CHANNELS, dtype=torch.float64)
    tail = x.new_zeros(2, conv.width - 1, CHANNELS)
    pieces = []
    for piece in x.split([1, 1, 5, 1, 3], dim=1):
        y, new = conv(piece, tail, in_place=True)
        assert new is tail
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), oracle(conv, x), rtol=0, atol=1e-12)
    more = torch.randn(1, 3, CHANNELS, dtype=torch.float64)
    want, after = conv(more, tail.clone(), torch.tensor([0, 2, 3]))
    assert torch.equal(conv(more, tail, torch.tensor([0, 2, 3]), in_place=True)[0], want)
    assert torch.equal(tail, after)


def test_gradients_flow_through_the_tail():
    conv = ShortConvolution(CHANNELS, bias=False).double()
    x = torch.randn(1, 6, CHANNELS, dtype=torch.float64, requires_grad=True)

    def split(x):
        first, tail = conv(x[:, :2])
        return torch.cat([first, conv(x[:, 2:], tail)[0]], dim=1)

    (whole,) = torch.autograd.grad(conv(x)[0].square().sum(), x)
    (pieces,) = torch.autograd.grad(split(x).square().sum(), x)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)


def test_the_tail_does_not_keep_the_input_alive():
    conv = ShortConvolution(CHANNELS)
    _, tail = conv(torch.randn(1, 100, CHANNELS))
    assert tail.untyped_storage().nbytes() == 3 * CHANNELS * 4


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="width must be at least 0: got -1"):
        ShortConvolution(CHANNELS, width=-1)
    with pytest.raises(ValueError, match=r"tail must have shape \[1, 3, 5\]: got \[2, 3, 5\]"):
        ShortConvolution(CHANNELS)(torch.randn(1, 4, CHANNELS), torch.randn(2, 3, CHANNELS))
    with pytest.raises(ValueError, match="x must have a batch of 1 when cu_seqlens packs sequences: got B=2"):
        ShortConvolution(CHANNELS)(torch.randn(2, 4, CHANNELS), cu_seqlens=torch.tensor([0, 1, 4]))
    for ends, message in (([0, 3], "run from 0 to T=4: got 0 to 3"), ([0, 3, 2, 4], "not decrease")):
        with pytest.raises(ValueError, match=f"cu_seqlens must {message}"):
            ShortConvolution(CHANNELS)(torch.randn(1, 4, CHANNELS), cu_seqlens=torch.tensor(ends))
