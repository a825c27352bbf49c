"""What must hold for any input: causality, linearity, and that levels belong to absolute positions."""

import pytest
import torch
from forms import FORMS, GATES, chunkwise
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle import SAME_NUMBERS, error, make_inputs

cases = given(
    gate=st.sampled_from(GATES), T=st.integers(1, 40), C=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 999)
)
settings.register_profile("few", settings.get_profile("repeatable"), max_examples=25)
few = settings.get_profile("few")
forms = pytest.mark.parametrize("name", FORMS)


def run(name, C, x):
    return FORMS[name](**x, **({"chunk_size": C} if name == "chunkwise" else {}))


def draw(gate, T, seed, L=4):
    return make_inputs(B=1, T=T, H=2, G=1, K=2, V=3, L=L, gate=gate, seed=seed)


@forms
@few
@cases
def test_the_future_changes_nothing(name, gate, T, C, seed):
    past = seed % (T + 1)
    x, other = draw(gate, T, seed), draw(gate, T, seed + 1000)
    mixed = {key: torch.cat([x[key][:, :past], other[key][:, past:]], 1) for key in x}
    assert torch.equal(run(name, C, x)[:, :past], run(name, C, mixed)[:, :past])


@forms
@pytest.mark.parametrize("argument", ["v", "level_scales", "q"])
@few
@cases
def test_linear_in_each(name, argument, gate, T, C, seed):
    x, other = draw(gate, T, seed), draw(gate, T, seed + 1000)
    both = {**x, argument: 2 * x[argument] - 3 * other[argument]}
    parts = 2 * run(name, C, x) - 3 * run(name, C, {**x, argument: other[argument]})
    assert error(run(name, C, both), parts) <= SAME_NUMBERS


@few
@cases
def test_levels_are_absolute_positions(gate, T, C, seed):
    """Zeros on the left change the result unless they move every token by a power of two that spans the row."""
    T = T + 8
    x = draw(gate, T, seed, L=9)
    pad = 1 + seed % T

    def padded(by, **changed):
        row = {key: torch.cat([torch.zeros_like(v[:, :1]).expand(-1, by, *v.shape[2:]), v], 1) for key, v in x.items()}
        return chunkwise(**{**row, **changed}, chunk_size=C)[:, by:]

    alone = chunkwise(**x, chunk_size=C)
    span = 1 << (T - 1).bit_length()
    assert error(padded(span), alone) <= SAME_NUMBERS
    assert error(padded(3 * span), alone) <= SAME_NUMBERS
    if pad != span:
        assert error(padded(pad), alone) > 1e-2
    x["level_scales"] = x["level_scales"][..., :1]  # with one level for all, nothing depends on position
    assert error(padded(pad), chunkwise(**x, chunk_size=C)) <= SAME_NUMBERS
