"""Dense, recurrent, chunkwise, for a scalar or a diagonal gate or none, with the delta rule or without: one map, in float64."""

from functools import lru_cache, partial

import pytest
import torch
from forms import FORMS, GATES, chunkwise

from loglinear import fenwick, reference
from oracle import (
    SAME_NUMBERS,
    TOLERANCES,
    error,
    gradients,
    levels_seen,
    linear_recurrence,
    make_inputs,
    oracle,
)

C = 8
LENGTHS = (0, 1, C - 1, C, C + 1, 2 * C - 1, 2 * C, 2 * C + 1, 4 * C - 1, 4 * C, 4 * C + 1, 8 * C - 1, 8 * C, 8 * C + 1)
EXACT = TOLERANCES[torch.float64]


forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
gates = pytest.mark.parametrize("gate", GATES)


def upto(x, T):
    return {name: tensor[:, :T] for name, tensor in x.items()}


@lru_cache
def expected(gate, L):
    """Inputs and the oracle's outputs at the greatest length; being causal, a prefix serves every shorter one."""
    x = make_inputs(T=max(LENGTHS), gate=gate, L=L)
    return x, oracle(**x)


@forms
@gates
@pytest.mark.parametrize("L", [9, 3], ids=["enough levels", "too few levels"])
def test_every_form_is_the_definition_at_every_length(form, gate, L):
    x, out = expected(gate, L)
    for T in LENGTHS:
        assert error(form(**upto(x, T)), out[:, :T]) <= EXACT, T


@gates
@pytest.mark.parametrize("chunk_size", [1, 2, 16, 32, 64, 128])
def test_chunk_size_changes_nothing(gate, chunk_size):
    x, out = expected(gate, 9)
    assert error(chunkwise(**x, chunk_size=chunk_size), out) <= EXACT


@gates
def test_gradients_of_every_form_are_the_definition_s(gate):
    T = 4 * C + 3
    x = make_inputs(T=T, gate=gate, grad=True)
    wanted = gradients(oracle(**x), x.values())
    for name, form in FORMS.items():
        for argument, have, want in zip(x, gradients(form(**x), x.values()), wanted):
            assert want.norm() > 0
            assert error(have, want) <= EXACT, (name, argument)


@gates
def test_gradcheck(gate):
    """Of one form: the test above has the others' gradients."""
    x = make_inputs(B=1, T=5, H=2, G=1, K=2, V=2, L=4, gate=gate, grad=True)
    form = partial(chunkwise, chunk_size=2)
    assert torch.autograd.gradcheck(lambda *values: form(**dict(zip(x, values))), tuple(x.values()))


@forms
@gates
def test_lambda_one_is_the_plain_linear_recurrence(form, gate):
    x = make_inputs(T=67, gate=gate)
    scales = x.pop("level_scales")
    plain = linear_recurrence(**x)
    assert error(form(**x, level_scales=torch.ones_like(scales)), plain) <= EXACT
    if form is not FORMS["recurrent"]:  # None switches the tree off; the counter has nothing to switch
        assert error(form(**x, level_scales=None), plain) <= EXACT


@forms
@gates
def test_one_level_shared_by_all_is_the_linear_recurrence_times_it(form, gate):
    x = make_inputs(T=67, gate=gate, L=1)
    shared = x.pop("level_scales")
    scaled = shared * linear_recurrence(**x)
    assert error(form(**x, level_scales=shared), scaled) <= EXACT
    assert error(form(**x, level_scales=shared.expand(-1, -1, -1, 9)), scaled) <= EXACT


@gates
@pytest.mark.parametrize("form", [FORMS["dense"], FORMS["recurrent"]], ids=["dense", "recurrent"])
def test_scale_is_a_factor_of_q(form, gate):
    x = make_inputs(T=20, gate=gate)
    assert error(form(**x, scale=0.3), oracle(**x, scale=0.3)) <= EXACT


@pytest.mark.parametrize("gate", ["scalar", "diagonal", "delta", "diagonal delta"])
def test_hard_resets_and_very_negative_gates(gate):
    """g = -inf forgets everything before the token, in every form, with gradients; so does -1e30, but for its log."""
    x = make_inputs(T=4 * C + 1, gate=gate)
    x["g"][:, [0, 5, C - 1, C, 3 * C + 2]] = -torch.inf
    x["g"][:, 2 * C + 1 : 2 * C + 4] = -1e30
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    out = oracle(**x)
    wanted = gradients(out, x.values())
    for name, form in FORMS.items():
        assert error(form(**x), out) <= EXACT, name
        for argument, have, want in zip(x, gradients(form(**x), x.values()), wanted):
            assert have.isfinite().all(), (name, argument)
            assert error(have, want) <= EXACT, (name, argument)


@pytest.mark.parametrize("offset", [0, 1, 7, 64, 1000])
def test_level_matrix_and_mask_by_definition(offset):
    size, levels = 40, 5
    matrix = reference.level_matrix(size, offset)
    scales = make_inputs(B=1, T=size, H=1, L=levels)["level_scales"][0, :, 0]
    mask = reference.level_mask(scales, offset)
    for t in range(size):
        seen = levels_seen(offset + t)[offset:]
        assert matrix[t, : t + 1].tolist() == seen == [fenwick.level(offset + t, offset + s) for s in range(t + 1)]
        assert mask[t, : t + 1].tolist() == [scales[t, min(level, levels - 1)].item() for level in seen]
        assert (mask[t, t + 1 :] == 0).all()


def test_segment_sum_never_subtracts():
    """A huge decay before a segment must not blur the segment: prefix sums in float32 would lose it entirely."""
    g = torch.tensor([-1e30, -1.0, -torch.inf, -0.5, -0.25, -1e30, -0.125])
    sums = reference.segment_sum(g)
    for t in range(len(g)):
        for s in range(len(g)):
            want = sum(g[s + 1 : t + 1].tolist()) if s <= t else -torch.inf
            assert sums[t, s].item() == torch.tensor(want, dtype=torch.float32).item(), (t, s)


@gates
def test_linear_form_continues_its_state(gate):
    x = make_inputs(T=45, gate=gate)
    x["g"] = x.get("g", torch.zeros_like(x["v"][..., 0]))
    plain = linear_recurrence(**{name: tensor for name, tensor in x.items() if name != "level_scales"})
    x["level_scales"] = None
    state, parts = None, []
    for left, right in ((0, 1), (1, 20), (20, 20), (20, 45)):
        piece = {name: None if t is None else t[:, left:right] for name, t in x.items()}
        part, state = reference.chunkwise(**piece, state=state, chunk_size=C)
        parts.append(part)
    assert error(torch.cat(parts, 1), plain) <= SAME_NUMBERS
    assert state.position.tolist() == [45, 45]


@gates
def test_a_token_that_is_not_finite_changes_nothing_before_it(gate):
    """In every form: to the last bit before the token, not finite after it wherever the definition is not."""
    x = make_inputs(B=1, T=3 * C + 3, gate=gate)
    clean = {name: form(**x) for name, form in FORMS.items()}
    for s in (0, 1, C - 1, C, 2 * C + 3, 3 * C + 2):
        for name in {"k", "v", "g", "beta"} & set(x):
            for value in (torch.nan, torch.inf):
                bad = {argument: tensor.clone() for argument, tensor in x.items()}
                bad[name][(0, s, 0) if x[name].dim() == 3 else (0, s, 0, 1)] = value
                undefined = ~oracle(**bad).isfinite()
                for form, whole in clean.items():
                    out = FORMS[form](**bad)
                    assert torch.equal(out[:, :s], whole[:, :s]), (form, name, value, s)
                    assert not out[undefined].isfinite().any(), (form, name, value, s)
