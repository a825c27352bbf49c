"""A token that is not finite changes nothing before it, nothing beside it, and everything after it is NaN."""

import pytest
import torch
from calls import C, both_rules, fields, inputs, kinds, run, tokens

import oracle
from oracle import gradients

five_kinds = kinds("scalar", "delta", "no gate", "linear scalar", "linear delta")
T = 3 * C + 10
POSITIONS = (0, 1, 30, C - 1, C, C + 17, 2 * C - 1, 2 * C, 3 * C, T - 1)
BAD = (torch.nan, torch.inf, -torch.inf)
HEAD, GROUP = 2, 1  # of 4 heads in 2 groups: a bad k is bad for heads 2 and 3


def faults(x):
    """(argument, value, position): NaN at all, infinities at every third; +inf among the gates is refused, -inf a reset."""
    named = [(name, value) for name in ("k", "v", "g", "beta") if name in x for value in BAD]
    named = [(name, value) for name, value in named if name != "g" or value != value]
    return [(name, value, s) for name, value in named for s in POSITIONS[:: 1 if value != value else 3]]


def spoilt(x, name, value, s):
    """x with one bad number in row 0, and the heads that must not notice."""
    of_group = name == "k"
    return oracle.spoilt(x, name, value, s, GROUP if of_group else HEAD, 1), [0, 1] if of_group else [0, 1, 3]


def check(o, clean, others, s, end, told):
    """NaN in a head of row 0 from token s to ``end``; the same bits before, after and beside them."""
    assert all(torch.equal(o[:, part], clean[:, part]) for part in (slice(s), slice(end, None))), told
    assert torch.equal(o[1:], clean[1:]), told
    assert torch.equal(o[:, :, others], clean[:, :, others]), told
    assert o[0, s:end, HEAD].isnan().all(), told


@five_kinds
def test_nothing_before_or_beside_a_bad_token_changes(kind):
    x = inputs(**kind, T=T, K=4, V=3)
    clean, _ = run(x)
    for name, value, s in faults(x):
        bad, others = spoilt(x, name, value, s)
        check(run(bad)[0], clean, others, s, T, (name, value, s))


@five_kinds
def test_what_the_definition_says_is_not_finite_is_not(kind):
    x = inputs(**kind, B=1, T=C + 5, K=4, V=3)
    for name, value, s in faults(x):
        if s >= C + 5:
            continue
        bad, _ = spoilt(x, name, value, s)
        undefined = ~oracle.oracle(**bad).isfinite()
        assert name == "g" or undefined.any()  # the first gate decays nothing
        assert not run(bad)[0][undefined].isfinite().any(), (name, value, s)


@five_kinds
def test_packed_sequences_do_not_notice(kind):
    x = inputs(**kind, B=1, T=T, K=4, V=3)
    bounds = [0, 50, 50, C + 50, T]
    offsets = torch.tensor(bounds)
    clean, state = run(x, cu_seqlens=offsets)
    for name, value, s in faults(x):
        bad, others = spoilt(x, name, value, s)
        o, spoilt_state = run(bad, cu_seqlens=offsets)
        own = max(i for i in range(4) if bounds[i] <= s)
        check(o, clean, others, s, bounds[own + 1], (name, value, s))
        rest = [i for i in range(4) if i != own]
        for field, before in fields(state).items():
            assert torch.equal(fields(spoilt_state)[field][rest], before[rest]), (name, value, s, field)


@five_kinds
@pytest.mark.parametrize("s", [10, 2 * C, 3 * C + 4])
def test_a_state_says_it_and_spares_the_rest(kind, s):
    """The call goes on from a state: NaN in that head for good, whether the bad token was in a closed or the open chunk."""
    x = inputs(**kind, T=6 * C, K=4, V=3)
    clean, _ = run(x)
    _, state = run(tokens(x, 0, T))
    for name, value, _ in {fault[:2]: fault for fault in faults(x)}.values():
        bad, others = spoilt(x, name, value, s)
        _, spoilt_state = run(tokens(bad, 0, T))
        if s >= 3 * C and "level_scales" in x:  # still in the open chunk
            assert torch.equal(spoilt_state.entries, state.entries)
            assert torch.equal(spoilt_state.decay, state.decay)
        if "level_scales" not in x:
            assert torch.equal(spoilt_state.state[:, others], run(tokens(x, 0, T))[1].state[:, others])
        o, _ = run(tokens(x, T, 6 * C), spoilt_state)
        assert o[0, :, HEAD].isnan().all(), (name, value, s)
        assert (o[1] - clean[1, T:]).abs().max() < 1e-10
        assert o[:, :, others].isfinite().all(), (name, value, s)


@both_rules
def test_a_closed_slot_is_spoilt_by_its_own_tokens_and_by_later_ones(gate):
    x = inputs(gate, B=1, T=3 * C + 7, K=4, V=3)  # slot 1 holds chunks 0 and 1, slot 0 chunk 2
    for s, spoilt_slots in ((5, [1]), (C + 5, [1]), (2 * C, [0, 1]), (3 * C + 1, [])):
        entries = run(spoilt(x, "v", torch.nan, s)[0])[1].entries[0, HEAD]
        assert [m for m in (0, 1) if entries[m].isnan().any()] == spoilt_slots, s


@five_kinds
@pytest.mark.parametrize("s", [C // 2, C + 9, 3 * C])
def test_gradients_before_a_bad_token_are_those_without_it(kind, s):
    x = inputs(**kind, B=1, T=T, K=4, V=3)
    clean = {n: tensor.clone().requires_grad_() for n, tensor in x.items()}
    wanted = gradients(run(clean)[0][:, :s], clean.values())
    for name, value, _ in {fault[:2]: fault for fault in faults(x)}.values():
        bad = {n: tensor.requires_grad_() for n, tensor in spoilt(x, name, value, s)[0].items()}
        for argument, have, want in zip(x, gradients(run(bad)[0][:, :s], bad.values()), wanted):
            torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10, msg=f"{argument} beside a bad {name}")
