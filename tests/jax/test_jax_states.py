"""States in JAX: prefill and going on at any position, token by token in a scan, and gradients through the state between."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
import torch
from calls import inputs, meaning, run
from jax_calls import op, step, to_jax, to_torch, tokens

from loglinear.jax import empty_state, slots_for
from oracle import TOLERANCES, error, make_inputs, oracle

pytestmark = pytest.mark.default_packages
BAR = TOLERANCES[torch.float64]
SMALL = {"B": 2, "H": 2, "G": 1, "K": 3, "V": 2}


def says(state):
    """``calls.meaning`` of a JAX state."""
    as_torch = {
        f.name: None if (y := getattr(state, f.name)) is None else to_torch(y) for f in dataclasses.fields(state)
    }
    if "state" in as_torch:
        return [as_torch["state"]]
    parts = [as_torch["decay"].exp()[..., None, None] * as_torch["entries"]]
    parts += [as_torch["open_k"], as_torch["open_v"], as_torch["open_g"].exp(), as_torch["open_beta"]]
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("gate", ["scalar", "delta", "diagonal delta"])
def test_a_token_at_a_time_from_any_prefill(gate):
    """Rows at positions of their own: row 1 is 3 tokens behind. One compilation of the scan serves both starts."""
    T = 150
    x = make_inputs(gate=gate, T=T, **SMALL)
    want, y = oracle(**x), to_jax(x)
    scan = jax.jit(lambda state, xs: jax.lax.scan(lambda s, x: step(x, s)[::-1], state, xs))
    sizes = {"delta_rule": "beta" in x, "per_channel": gate.startswith("diagonal"), "dtype": jnp.float64}
    start = empty_state(2, 1, 2, 3, 2, T, **sizes)
    for first in (0, 67):
        state = start
        if first:
            parts = [{k: v[row : row + 1, :n] for k, v in y.items()} for row, n in enumerate((first, first - 3))]
            packed = jax.tree.map(lambda *z: jnp.concatenate(z, 1), *parts)
            bounds = jnp.asarray([0, first, 2 * first - 3])
            state = op(packed, cu_seqlens=bounds, output_final_state=True)[1].with_slots(start.entries.shape[2])
        begins = [first, max(first - 3, 0)]
        xs = {k: jnp.stack([v[row, n : n + 80, None] for row, n in enumerate(begins)], 1) for k, v in y.items()}
        after, o = scan(state, xs)
        for row, n in enumerate(begins):
            assert error(to_torch(o[:, row, 0]), want[row, n : n + 80]) <= BAR
        assert after.position.tolist() == [n + 80 for n in begins]


@pytest.mark.parametrize(("gate", "linear", "cut"), [("scalar", False, 64), ("delta", False, 94), ("delta", True, 94)])
def test_two_parts_and_a_state_are_one_pass_of_the_pytorch_side(gate, linear, cut):
    """Outputs, states and gradients: of a prefill of whole blocks, and of one with a rest, cut inside of a chunk."""
    T = 300
    x = inputs(gate, linear=linear, hard=True, T=T, grad=True, **SMALL)
    expected, state = run(x)
    whole = torch.autograd.grad(
        expected.square().sum() + sum(part.square().sum() for part in meaning(state)), list(x.values())
    )
    y = to_jax(x)

    def parts(y):
        first, before = op(tokens(y, 0, cut), output_final_state=True)
        second, after = op(tokens(y, cut, T), initial_state=before, output_final_state=True)
        o = jnp.concatenate([first, second], 1)
        if linear:
            said = [after.state]
        else:
            said = [
                jnp.exp(after.decay)[..., None, None] * after.entries,
                after.open_k,
                after.open_v,
                jnp.exp(after.open_g),
            ]
            said += [] if after.open_beta is None else [after.open_beta]
        return jnp.square(o).sum() + sum(jnp.square(part).sum() for part in said), (o, after)

    grads, (o, after) = jax.jit(jax.grad(parts, has_aux=True))(y)
    assert error(to_torch(o), expected) <= BAR
    assert max(error(have[:, :, : want.shape[2]], want) for have, want in zip(says(after), meaning(state))) <= BAR
    for name, want in zip(x, whole):
        assert error(to_torch(grads[name]), want) <= BAR, name


def test_packed_sequences_go_on():
    x = inputs("scalar", T=200, **{**SMALL, "B": 1})
    bounds, more = torch.tensor([0, 0, 1, 66, 130, 200]), torch.tensor([0, 70, 71, 71, 136, 200])
    _, state = run(x, cu_seqlens=bounds)
    expected, last = run(x, state, cu_seqlens=more)
    y = to_jax(x)
    _, state = op(y, cu_seqlens=to_jax(bounds), output_final_state=True)
    o, after = op(y, cu_seqlens=to_jax(more), initial_state=state, output_final_state=True)
    assert error(to_torch(o), expected) <= BAR
    assert after.position.tolist() == last.position.tolist()
    assert max(map(error, says(after), meaning(last))) <= BAR


def test_a_bad_token_stays_in_its_slot():
    x = inputs("scalar", T=200, **SMALL)
    x["v"][0, 90, 0] = torch.nan
    _, want = run(x)
    _, state = op(to_jax(x), output_final_state=True)
    for have, expected in zip(says(state), meaning(want)):
        assert torch.equal(have.isnan(), expected.isnan())


def test_a_state_without_a_slot_for_its_chunk_says_so():
    x = {k: v[:, :1] for k, v in to_jax(make_inputs(gate="scalar", T=1, **SMALL)).items()}
    full = dataclasses.replace(
        empty_state(2, 1, 2, 3, 2, 127, dtype=jnp.float64), position=jnp.array([127, 3], jnp.int32)
    )
    assert full.entries.shape[2] == slots_for(127) == 1
    with pytest.raises(ValueError, match="state must have 2 slots for 128 tokens"):
        step(x, full)
    _, after = jax.jit(partial(step))(x, full)
    assert jnp.isnan(after.entries[0]).all()
    assert jnp.isfinite(after.entries[1]).all()
