"""Calls from states and to states, cut into blocks: outputs, states and all gradients are those of the chunkwise form."""

from __future__ import annotations

import pytest
import torch
from calls import meaning

from loglinear import log_linear_attention, log_linear_delta_rule
from loglinear.ops import dispatch, segments
from loglinear.ops.inputs import Call, Inputs
from loglinear.reference.chunkwise import chunkwise
from loglinear.state import LinearState, LogLinearState, joined
from oracle import error

CASES = {  # tokens before and after; packed
    "from nothing": ((0, 0), (193, 193), False),
    "one position": ((130, 130), (259, 259), False),
    "positions": ((70, 331), (150, 150), False),
    "packed": ((64, 7, 200, 0), (66, 0, 130, 5), True),
}
NAMES = ("entries", "decay", "open_k", "open_v", "open_g", "open_beta", "state")


def make(length, delta, linear, seed, channels=()):
    """Inputs of one row in float64: q, k, v, g, λ or None, β or None. Two heads share a q/k head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(1, length, *size, generator=generator, dtype=torch.float64)

    k = torch.nn.functional.normalize(normal(1, 6), dim=-1)
    g = -0.02 * normal(2, *channels).abs()
    g[:, 3::97] = float("-inf")  # resets
    return [normal(1, 6), k, normal(2, 5), g, None if linear else normal(2, 6), normal(2).sigmoid() if delta else None]


def join(parts, axis):
    return [None if part[0] is None else torch.cat(part, axis) for part in zip(*parts)]


def join_states(states):
    """One state, whose tensors are leaves of a graph where they are continuous."""
    whole = joined(states).detach()
    for x in whole._tensors():
        x.requires_grad_(x.is_floating_point())
    return whole


def compare(o, got, want, expected, leaves):
    """Outputs, states, and the gradients of all tensors in ``leaves``."""
    assert type(got) is type(expected)
    assert torch.equal(got.position, expected.position)
    pairs = [(o, want)]
    for name in NAMES:
        ours, reference = getattr(got, name, None), getattr(expected, name, None)
        assert (ours is None) == (reference is None)
        if ours is None or name == "decay":
            continue
        if name == "entries":  # the split between both is free
            ours, reference = (
                x.entries * x.decay.exp().view(*x.decay.shape, *[1] * (5 - x.decay.dim())) for x in (got, expected)
            )
        pairs.append((ours, reference))
    weights = [torch.randn_like(reference) for _, reference in pairs]
    losses = [sum((w * pair[i]).sum() for w, pair in zip(weights, pairs)) for i in (0, 1)]
    grads = [torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True) for loss in losses]
    for ours, reference in [*pairs, *zip(*grads)]:
        assert ours.shape == reference.shape
        torch.testing.assert_close(ours.nan_to_num(neginf=0.0), reference.nan_to_num(neginf=0.0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("linear", [False, True], ids=["tree", "linear"])
@pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
def test_outputs_states_and_gradients(case, linear, delta):
    before, after, packed = CASES[case]
    rows = [make(a + b, delta, linear, seed) for seed, (a, b) in enumerate(zip(before, after))]
    states = None
    if any(before):
        parts = [[None if x is None else x[:, :n] for x in row] for row, n in zip(rows, before)]
        states = join_states([chunkwise(*part)[1] for part in parts])
    new = join([[None if x is None else x[:, n:] for x in row] for row, n in zip(rows, before)], 1 if packed else 0)
    new = [None if x is None else x.requires_grad_() for x in new]
    q, k, v, g, scales, beta = new
    bounds = torch.tensor([0, *after]).cumsum(0) if packed else None
    o, got = segments.attend(Call(Inputs(q, k, v, g, beta, scales), 0.5, states, True, bounds), after)
    want, expected = chunkwise(0.5 * q, k, v, g, scales, beta, states, lengths=after)
    assert isinstance(got, LinearState if linear else LogLinearState)
    leaves = [x for x in (*new, *([] if states is None else states._tensors())) if x is not None and x.requires_grad]
    compare(o, got, want, expected, leaves)


KNOWN = [((n, n), False) for n in (0, 1, 63, 64, 65, 127, 128, 192, 449, 1000)]
KNOWN += [((0, 70, 1, 300, 64, 0), True), ((), True)]


@pytest.mark.parametrize(("lengths", "packed"), KNOWN, ids=str)
@pytest.mark.parametrize("gate", ["scalar", "channels", "none"])
def test_the_state_beside_an_output_that_is_known(lengths, packed, gate):
    """As kernels give it: any numbers."""
    channels = (6,) if gate == "channels" else ()
    rows = [make(n, False, False, seed, channels) for seed, n in enumerate(lengths or (0,))]
    q, k, v, g, scales = (x.requires_grad_() for x in join(rows, 1 if packed else 0)[:5])
    bounds = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    inputs = Inputs(q, k, v, None if gate == "none" else g, None, scales)
    o, got = segments.attend(Call(inputs, 1.0, None, True, bounds), lengths, v)
    assert torch.equal(o, v)
    expected = chunkwise(q, k, v, 0 * g.detach().nan_to_num() if gate == "none" else g, scales, lengths=lengths)[1]
    compare(o, got, v, expected, [k, v] if gate == "none" else [k, v, g])


@pytest.mark.parametrize("linear", [False, True], ids=["tree", "linear"])
@pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
def test_sixteen_bits_go_on_from_a_float32_state(linear, delta):
    """Two parts in bfloat16 against one pass in float64: outputs, states and gradients, into the first part too.

    Every part rounds its outputs, and the delta rule its matrices; a state in between is float32, as decoding leaves it.
    """
    low = [x if x is None else x.float() for x in make(389, delta, linear, 0)]
    low = [x if x is None or i > 2 else x.bfloat16() for i, x in enumerate(low)]
    low = [None if x is None else x.requires_grad_() for x in low]
    wide = [None if x is None else x.detach().double().requires_grad_() for x in low]
    state, outputs = None, []
    for tokens in (slice(0, 200), slice(200, 389)):
        q, k, v, g, scales, beta = (None if x is None else x[:, tokens] for x in low)
        o, state = segments.attend(Call(Inputs(q, k, v, g, beta, scales), 1.0, state, True), (q.shape[1],))
        outputs.append(o)
    q, k, v, g, scales, beta = wide
    want, expected = chunkwise(q, k, v, g, scales, beta)
    held = meaning(state)[0]
    assert held.dtype == torch.float32
    reference = meaning(expected)[0]
    pairs = [(torch.cat(outputs, 1), want), (held, reference)]
    weight = torch.randn_like(want)
    losses = [(weight * o.double()).sum() + s.double().square().sum() for o, s in zip(*pairs)]
    leaves = [[x for x in inputs if x is not None] for inputs in (low, wide)]
    grads = [torch.autograd.grad(loss, inputs) for loss, inputs in zip(losses, leaves)]
    for ours, exact in [*pairs, *zip(*grads)]:
        assert error(ours, exact) <= 5e-3  # measured at most 3.2e-3


@pytest.mark.parametrize(("rule", "linear"), [("scalar", True), ("delta", False), ("delta", True)])
def test_the_public_ops_take_this_way_where_kernels_are(monkeypatch, rule, linear):
    """Delta rule and linear models. Short calls and calls without states go other ways."""
    taken = []
    attend = segments.attend
    monkeypatch.setattr(segments, "attend", lambda *x: taken.append(x[1]) or attend(*x))
    monkeypatch.setattr(dispatch, "from_state", lambda inputs, state, backend: inputs.q.shape[1] > 64)
    delta = rule == "delta"
    q, k, v, g, scales, beta = make(200, delta, linear, 0)

    def call(part, state):
        x = [None if y is None else y[:, part] for y in (q, k, v, g, beta, scales)]
        if delta:
            return log_linear_delta_rule(*x, initial_state=state, output_final_state=True)
        return log_linear_attention(*x[:4], x[5], initial_state=state, output_final_state=True)

    first, state = call(slice(0, 100), None)
    second, state = call(slice(100, 180), state)
    third, state = call(slice(180, 200), state)
    assert taken == [(100,), (80,)]
    want, _ = chunkwise(q, k, v, g, scales, beta)
    torch.testing.assert_close(torch.cat([first, second, third], 1), want)
    assert state.position.tolist() == [200]
