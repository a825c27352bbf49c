"""A hidden state that is not finite reaches no earlier token, no other row and no other packed sequence of a mixer."""

import pytest
import torch
from test_mixers import HIDDEN, PIECES, make

from loglinear.layers import ShortConvolution

RECURRENT = [name for name in PIECES if name != "attention"]
T = 100
BAD = (torch.nan, torch.inf)
POSITIONS = (0, 1, 40, 63, 64, 70, T - 1)


def spoilt(x, s, value):
    x = x.clone()
    x[0, s, 3] = value
    return x


@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_nothing_before_or_beside_a_bad_token_changes(name):
    mixer, x = make(name), torch.randn(2, T, HIDDEN, dtype=torch.float64)
    clean = mixer(x)[0]
    for s in POSITIONS:
        for value in BAD:
            o, _ = mixer(spoilt(x, s, value))
            assert torch.equal(o[:, :s], clean[:, :s]), (s, value)
            assert torch.equal(o[1], clean[1]), (s, value)
            assert not o[0, s:].isfinite().any(), (s, value)


@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_packed_sequences_do_not_notice(name):
    mixer, x = make(name), torch.randn(1, T, HIDDEN, dtype=torch.float64)
    bounds = [0, 30, 30, 70, T]
    offsets = torch.tensor(bounds)
    clean = mixer(x, None, False, offsets)[0]
    for s in POSITIONS:
        o, _ = mixer(spoilt(x, s, torch.nan), None, False, offsets)
        end = next(bound for bound in bounds if bound > s)
        assert torch.equal(o[:, :s], clean[:, :s]), s
        assert torch.equal(o[:, end:], clean[:, end:]), s
        assert not o[0, s:end].isfinite().any(), s


@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_calls_that_go_on_in_place(name):
    """Prefill, one token, several, a long call: in the buffers of one state for decoding, row 0 bad from token 50 on."""
    mixer, x = make(name), torch.randn(2, T, HIDDEN, dtype=torch.float64)
    outputs = []
    for hidden in (x, spoilt(x, 50, torch.nan)):
        o, state = mixer(hidden[:, :20], None, True)
        parts, state = [o], state.for_decoding(2 * T)
        for a, b in ((20, 21), (21, 40), (40, 60), (60, T)):
            o, state = mixer(hidden[:, a:b], state, True)
            parts.append(o)
        outputs.append(torch.cat(parts, 1))
    clean, o = outputs
    assert torch.equal(o[:, :50], clean[:, :50])
    assert torch.equal(o[1], clean[1])
    assert not o[0, 50:].isfinite().any()


@pytest.mark.parametrize("packed", [False, True])
def test_a_convolution_spoils_its_window_and_no_more(packed):
    conv = ShortConvolution(5, width=4).double()
    x, tail = torch.randn(1, 20, 5, dtype=torch.float64), torch.randn(2 if packed else 1, 3, 5, dtype=torch.float64)
    offsets = torch.tensor([0, 12, 20]) if packed else None
    clean, clean_tail = conv(x, tail, offsets)
    for s in (0, 3, 10, 11, 12, 19):
        y, new_tail = conv(spoilt(x, s, torch.nan), tail, offsets)
        end = 12 if packed and s < 12 else 20
        reached = torch.zeros(20, dtype=torch.bool)
        reached[s : min(s + 4, end)] = True
        assert y[0, reached, 3].isnan().all(), s
        assert torch.equal(y[0, ~reached], clean[0, ~reached]), s
        spoilt_rows = [int(packed and s >= 12)] if s >= end - 3 else []
        for row in range(len(tail)):
            assert torch.equal(new_tail[row], clean_tail[row]) == (row not in spoilt_rows), (s, row)
