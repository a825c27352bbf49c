"""Steps against the full pass, in the plain torch form: every place where a chunk opens, closes or merges."""

import dataclasses

import pytest
import torch
from calls import C, both_rules, inputs, rows, tokens
from calls import run as full

import loglinear
from loglinear import DecodingState
from oracle import error as relative

WIDE = torch.float64


def step(x, state, **kwargs):
    op = loglinear.log_linear_delta_rule_step if "beta" in x else loglinear.log_linear_attention_step
    return op(**{"g": None, **x}, state=state, **kwargs)


def empty(x, max_context=4096, **kwargs):
    B, _, H, V = x["v"].shape
    G, K = x["q"].shape[2:]
    kind = {"delta_rule": "beta" in x, "per_channel": x["g"].dim() == 4}
    return DecodingState.empty(B, H, G, K, V, max_context, x["v"].dtype, **kind, **kwargs)


def steps(x, state, sizes=(1,), **kwargs):
    """All tokens of x, in calls of these sizes in turn."""
    outputs, start = [], 0
    while start < x["v"].shape[1]:
        end = start + sizes[len(outputs) % len(sizes)]
        outputs.append(step(tokens(x, start, end), state, **kwargs))
        start = end
    return torch.cat(outputs, 1)


def prefilled(x, length, max_context=4096, **kwargs):
    state = full(tokens(x, 0, length))[1]
    return DecodingState.from_state(state, max_context, dtype=x["v"].dtype, **kwargs)


def assert_states_equal(got, want, bar):
    """The same past: buckets with their logs, and the open chunk."""
    assert torch.equal(got.position, want.position)
    slots = want.entries.shape[2]
    assert (got.entries[:, :, slots:] == 0).all()
    for name in ("open_k", "open_v", "open_g", "open_beta"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b.to(a.dtype), rtol=bar, atol=bar)
    entries = [state.entries[:, :, :slots] * state.decay[:, :, :slots, None, None].exp() for state in (got, want)]
    assert relative(*entries) < bar or entries[1].norm() == 0


@both_rules
def test_no_gate_is_a_gate_of_zero(gate):
    x = inputs(gate, T=C + 9, dtype=WIDE)
    x["g"].zero_()
    without = {name: value for name, value in x.items() if name != "g"}
    assert torch.equal(steps(x, empty(x)), steps(without, empty(x)))


def poisoned(state):
    """NaN in every slot and place that is not live, rows at one position."""
    chunk, used = divmod(int(state.position[0]), state.chunk_size)
    half = chunk % 2
    for m in range(state.entries.shape[2]):
        if not chunk >> m & 1:
            state.entries[:, :, m] = torch.nan
            if state.decay is not None:
                state.decay[..., m] = torch.nan
    if state.decay is not None:
        state.decay[:, 1 - half] = torch.nan
    state.open_v[:, :, used:] = torch.nan
    for ring in (state.open_k, state.open_g, state.open_solve):
        if ring is not None:
            ring.unflatten(2, (2, -1))[:, :, half, used:] = torch.nan
            ring.unflatten(2, (2, -1))[:, :, 1 - half] = torch.nan
    return state


def test_positions_of_several_layers_advance_once():
    x = inputs("scalar", T=3, dtype=WIDE)
    first, second = empty(x), empty(x)
    second.position = first.position
    for t in range(3):
        now = tokens(x, t, t + 1)
        a, b = step(now, first, advance=False), step(now, second)
        assert torch.equal(a, b)
    assert first.position.tolist() == [3] * len(first.position)
    assert torch.equal(first.entries, second.entries)


def test_under_autocast_the_operands_are_low():
    x = inputs("scalar", T=2, dtype=torch.float32)
    state = empty({name: value.bfloat16() for name, value in x.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert step(x, state).dtype == torch.bfloat16
    assert state.position.tolist() == [2] * state.batch_size


# ------------------------------------------------------------------------------------------------- what callers get wrong

X = {gate: tokens(inputs(gate, B=2, T=2 * C, H=4, G=2, dtype=torch.float32), 0, C + 1) for gate in ("scalar", "delta")}
ONE = {gate: tokens(x, 0, 1) for gate, x in X.items()}
S, D = ONE.values()


def changed(name, fn):
    """A state with one tensor changed."""
    state = empty(D if name == "open_solve" else S)
    return dataclasses.replace(state, **{name: fn(getattr(state, name))})


BAD = {
    "T too large": ("scalar", X["scalar"], empty, ValueError, ["q must have 1 to 64 tokens", "T=65", "to_state()"]),
    "T of 0": ("scalar", tokens(S, 0, 0), empty, ValueError, ["q must have 1 to 64 tokens", "T=0"]),
    "an ordinary state": ("scalar", S, lambda x: full(x)[1], TypeError, ["state must be a DecodingState"]),
    "no state": ("scalar", S, lambda x: None, TypeError, ["state must be a DecodingState", "NoneType"]),
    "no λ": ("scalar", S | {"level_scales": None}, empty, TypeError, ["level_scales must be", "None"]),
    "no β": ("delta", D | {"beta": None}, empty, TypeError, ["beta must be", "None"]),
    "g above 0": ("scalar", S | {"g": S["g"] + 9}, empty, ValueError, ["g must be a log decay"]),
    "the other rule's": ("delta", D, lambda x: empty(S), ValueError, ["got a state of the scalar"]),
    "another batch": ("scalar", rows(S, [0]), lambda x: empty(S), ValueError,
                      ["state.position must have shape [1]", "got [2]"]),
    "another dtype": ("scalar", S, lambda x: changed("open_k", torch.Tensor.bfloat16), TypeError,
                      ["state.open_k must be float32 for inputs of float32", "got torch.bfloat16"]),
    "a chunk of 24": ("scalar", S, lambda x: dataclasses.replace(empty(x), chunk_size=24), ValueError,
                      ["state.chunk_size must be a power of two", "got 24"]),
    "another chunk": ("scalar", S, lambda x: dataclasses.replace(empty(x), chunk_size=32), ValueError,
                      ["state.open_k must have shape [2, 2, 64, 3]", "got [2, 2, 128, 3]"]),
    "wrong entries": ("scalar", S, lambda x: changed("entries", lambda y: y[..., 1:]), ValueError,
                      ["state.entries must have shape"]),
    "gradients": ("scalar", S | {"v": S["v"].clone().requires_grad_()}, empty, ValueError, ["v must not require gradients"]),
    "an index of 32 bits": ("scalar", S | {"state_indices": torch.arange(2).int()}, empty, TypeError,
                            ["state_indices must be int64", "got torch.int32"]),
    "another index": ("scalar", S | {"state_indices": torch.tensor([0, 1, 0])}, empty, ValueError,
                      ["state_indices must have shape [2] on cpu", "got [3]"]),
    "v no tensor": ("scalar", S | {"v": 3}, lambda x: empty(S), TypeError, ["v must be a tensor"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    gate, x, make, error, parts = BAD[case]
    state = make(x if "beta" not in x or x["beta"] is not None else D)
    op = loglinear.log_linear_delta_rule_step if gate == "delta" else loglinear.log_linear_attention_step
    with pytest.raises(error) as raised:
        op(**x, state=state)
    for part in parts:
        assert part in str(raised.value)


def test_no_room_raises_before_anything_is_written():
    x = tokens(X["scalar"], 0, C)
    state = empty(x, max_context=1)
    assert state.max_context == 127
    step(x, state)
    before = state.clone()
    with pytest.raises(ValueError, match=r"state must hold 128 tokens .* got max_context=127"):
        step(x, state)
    assert all(torch.equal(a, b) for a, b in zip(before._tensors(), state._tensors()))
    step(x, state.grow(1000))
