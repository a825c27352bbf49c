"""Calls from states and to states, cut into blocks: outputs, states and all gradients are those of the chunkwise form."""

from __future__ import annotations

import pytest
import torch
from calls import chunked, inputs, meaning, run, together, tokens

from loglinear.ops import dispatch, segments
from loglinear.ops.inputs import Call, Inputs
from loglinear.state import LinearState, LogLinearState, joined
from oracle import error, gradients

CASES = {  # tokens before and after; packed
    "from nothing": ((0, 0), (193, 193), False),
    "one position": ((130, 130), (259, 259), False),
    "positions": ((70, 331), (150, 150), False),
    "packed": ((64, 7, 200, 0), (66, 0, 130, 5), True),
}
both_forms = pytest.mark.parametrize("linear", [False, True], ids=["tree", "linear"])
both_rules = pytest.mark.parametrize("gate", ["scalar", "delta"])


def make(gate, length, linear=False, seed=0):
    """Inputs of one row in float64 that forget slowly, but for resets. Two heads share a q/k head."""
    x = inputs(gate, B=1, T=length, H=2, G=1, K=6, V=5, L=6, linear=linear, seed=seed)
    if "g" in x:
        x["g"] *= 0.1
        x["g"][:, 3::97] = -torch.inf
    return x


def attend(x, lengths, state=None, scale=1.0, bounds=None, o=None):
    """(o, final state)."""
    return segments.attend(Call(Inputs(*map(x.get, Inputs._fields)), scale, state, True, bounds), lengths, o)


def compare(got, want, leaves):
    """Outputs, states, and the gradients of all tensors in ``leaves``."""
    assert type(got[1]) is type(want[1])
    assert torch.equal(got[1].position, want[1].position)
    ours, theirs = ([o, *meaning(state)] for o, state in (got, want))
    pairs = zip([*ours, *gradients(ours, leaves)], [*theirs, *gradients(theirs, leaves)], strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
@both_forms
@both_rules
def test_outputs_states_and_gradients(case, linear, gate):
    before, after, packed = CASES[case]
    rows = [make(gate, a + b, linear, seed) for seed, (a, b) in enumerate(zip(before, after))]
    state = None
    if any(before):  # its tensors are leaves of a graph where they are continuous
        state = joined([chunked(tokens(x, 0, n))[1] for x, n in zip(rows, before)])
        state = state._map(lambda x: x.detach().requires_grad_(x.is_floating_point()))
    x = together([tokens(x, n, None) for x, n in zip(rows, before)], 1 if packed else 0)
    leaves = [y.requires_grad_() for y in x.values()]
    leaves += [] if state is None else [y for y in state._tensors() if y.requires_grad and y.numel()]
    bounds = torch.tensor([0, *after]).cumsum(0) if packed else None
    got = attend(x, after, state, 0.5, bounds)
    assert isinstance(got[1], LinearState if linear else LogLinearState)
    compare(got, chunked(x, state, after, scale=0.5), leaves)


KNOWN = [((n, n), False) for n in (0, 1, 63, 64, 65, 127, 128, 192, 449, 1000)]
KNOWN += [((0, 70, 1, 300, 64, 0), True), ((), True)]


@pytest.mark.parametrize(("lengths", "packed"), KNOWN, ids=str)
@pytest.mark.parametrize("gate", ["scalar", "diagonal", "identity"])
def test_the_state_beside_an_output_that_is_known(lengths, packed, gate):
    """As kernels give it: any numbers."""
    x = together([make(gate, n, seed=seed) for seed, n in enumerate(lengths or (0,))], 1 if packed else 0)
    x = {name: y.requires_grad_() for name, y in x.items()}
    bounds = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    o, state = attend(x, lengths, bounds=bounds, o=x["v"])
    assert torch.equal(o, x["v"])
    compare((o, state), (x["v"], chunked(x, lengths=lengths)[1]), x.values())


@both_forms
@both_rules
def test_sixteen_bits_go_on_from_a_float32_state(linear, gate):
    """Two parts in bfloat16 against one pass in float64: outputs, states and gradients, into the first part too.

    Every part rounds its outputs, and the delta rule its matrices; a state in between is float32, as decoding leaves it.
    """
    low = {name: y.bfloat16() if name in "qkv" else y.float() for name, y in make(gate, 389, linear).items()}
    wide = {name: y.double().requires_grad_() for name, y in low.items()}
    first, state = attend(tokens({name: y.requires_grad_() for name, y in low.items()}, 0, 200), (200,))
    second, state = attend(tokens(low, 200, 389), (189,), state)
    want, expected = chunked(wide)
    got, want = [torch.cat([first, second], 1), meaning(state)[0]], [want, meaning(expected)[0]]
    assert got[1].dtype == torch.float32
    for ours, exact in zip(
        [*got, *gradients(got, low.values())], [*want, *gradients(want, wide.values())], strict=True
    ):
        assert error(ours, exact) <= 5e-3  # measured at most 3.2e-3


@pytest.mark.parametrize(("gate", "linear"), [("scalar", True), ("delta", False), ("delta", True)])
def test_the_public_ops_take_this_way_where_kernels_are(monkeypatch, gate, linear):
    """Delta rule and linear models. Short calls and calls without states go other ways."""
    taken, attend = [], segments.attend
    monkeypatch.setattr(segments, "attend", lambda *x: taken.append(x[1]) or attend(*x))
    monkeypatch.setattr(dispatch, "from_state", lambda inputs, state, backend: inputs.q.shape[1] > 64)
    x, state, outputs = make(gate, 200, linear), None, []
    for start, end in ((0, 100), (100, 180), (180, 200)):
        o, state = run(tokens(x, start, end), state)
        outputs.append(o)
    assert taken == [(100,), (80,)]
    torch.testing.assert_close(torch.cat(outputs, 1), chunked(x)[0])
    assert state.position.tolist() == [200]
