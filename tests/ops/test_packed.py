"""Neighbours do not exist: a packed sequence, a row of a batch and a sequence alone are the same bits."""

from itertools import pairwise

import pytest
import torch
from calls import C, fields, inputs, kinds, output, run, tokens

from oracle import gradients

LENGTHS = [0, 1, 5, C, C + 1, 0, 2 * C - 1, 1, 3 * C, 130, 0]
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0)
five_kinds = kinds("scalar", "delta", "scalar, resets", "linear scalar", "linear delta")


def assert_row(state, row, alone):
    """Row ``row`` holds the bits of ``alone``; slots that only a longer neighbour needs are empty."""
    for name, tensor in fields(state).items():
        mine, own = tensor[row], getattr(alone, name)[0]
        if name in ("entries", "decay"):
            assert mine[:, own.shape[1] :].eq(0).all()
            mine = mine[:, : own.shape[1]]
        assert torch.equal(mine, own), (row, name)


@five_kinds
def test_packed_sequences_continue_packed(kind):
    """Each sequence goes on from its own row of the state; an empty one keeps its row, bit for bit."""
    more = [3, 0, C, 1, 0, 0, 1, 2 * C + 9, 7, 0, 2]
    x, y = inputs(**kind, B=1, T=sum(LENGTHS)), inputs(**kind, B=1, T=sum(more), seed=1)
    bounds = torch.tensor([0, *more]).cumsum(0)
    _, first = run(x, cu_seqlens=BOUNDS)
    for row, (left, right) in enumerate(pairwise(BOUNDS.tolist())):
        assert_row(first, row, run(tokens(x, left, right))[1])
    o, second = run(y, first, cu_seqlens=bounds)
    assert second.position.tolist() == [a + b for a, b in zip(LENGTHS, more)]
    for row, (left, right) in enumerate(pairwise(bounds.tolist())):
        alone, alone_state = run(tokens(y, left, right), first.reorder(torch.tensor([row])))
        assert torch.equal(o[:, left:right], alone)
        assert_row(second, row, alone_state)
        if more[row] == 0:
            assert_row(second, row, first.reorder(torch.tensor([row])))


@five_kinds
@pytest.mark.parametrize(
    ("dtype", "T"),
    [
        *((torch.float32, T) for T in (1, C - 1, 2 * C, 5 * C + 3)),
        *((torch.float64, 2 * C), (torch.bfloat16, C - 1), (torch.bfloat16, 5 * C + 3)),
    ],
)
def test_a_row_alone_is_the_row_in_the_batch(kind, dtype, T):
    x = inputs(**kind, B=5, T=T, K=16, V=8, dtype=dtype, grad=True)
    o, state = run(x)
    for row in (0, 3, 4):
        y = {name: tensor.detach()[[row]].clone().requires_grad_() for name, tensor in x.items()}
        alone, alone_state = run(y)
        assert torch.equal(o[[row]], alone)
        assert_row(state, row, alone_state)
        for name, *pair in zip(x, gradients(o[[row]], x.values()), gradients(alone, y.values()), strict=True):
            assert torch.equal(pair[0][[row]], pair[1]), name


def test_every_way_to_give_the_bounds():
    x = inputs("delta", B=1, T=sum(LENGTHS))
    expected = output(x, cu_seqlens=BOUNDS)
    assert torch.equal(output(x, cu_seqlens=BOUNDS.int()), expected)
    assert torch.equal(output(x, cu_seqlens=BOUNDS, cu_seqlens_cpu=BOUNDS), expected)
    assert torch.equal(output(x, cu_seqlens=BOUNDS.int(), cu_seqlens_cpu=BOUNDS.int()), expected)
    whole = torch.tensor([0, sum(LENGTHS)])
    assert torch.equal(output(x, cu_seqlens=whole), output(x))
    assert not torch.equal(output(x), expected)


@kinds("delta", "linear scalar")
def test_no_sequences_and_only_empty_ones(kind):
    for bounds in ([0], [0, 0, 0]):
        o, state = run(inputs(**kind, B=1, T=0), cu_seqlens=torch.tensor(bounds))
        assert o.shape == (1, 0, 4, 5)
        assert state.position.tolist() == [0] * (len(bounds) - 1)
