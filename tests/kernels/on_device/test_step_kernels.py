"""The step kernels against float64, and to the bit where only a row's neighbours or what is dead differ."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import cases
import pytest
import torch
from cases import BFLOAT16, DECAY, DELTA, FLOAT32, INTERPRETED, LOW_PRECISION_FACTOR, relative

from loglinear import DecodingState
from loglinear.kernels import decoding
from loglinear.reference.chunkwise import chunkwise
from loglinear.reference.step import step as plain_step
from oracle import plain_torch

C = 16 if INTERPRETED else 64
# Tokens before the steps: nothing, chunks about to close with 0, 1 and 3 merges, and chunks that have just opened.
PREFILLS = (
    (0, C - 1, 2 * C - 1, 3 * C, 8 * C - 2) if INTERPRETED else (1, 5, 63, 64, 65, 127, 128, 200, 1000, 4096, 4097)
)
STEPS = 3 if INTERPRETED else 200
HEADS = 1 if INTERPRETED else 4


class Rule(NamedTuple):
    """A transition: whether it is the delta rule, and whether each key channel has a gate."""

    delta: bool
    channel: bool


RULES = {
    "scalar gate": Rule(False, False),
    "delta rule": Rule(True, False),
    "channel gate": Rule(False, True),
    "channel delta rule": Rule(True, True),
}
all_rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
# A gate per channel without the delta rule runs a part of what both together run.
MOST = RULES if not INTERPRETED else {name: rule for name, rule in RULES.items() if rule.delta or not rule.channel}
rules = pytest.mark.parametrize("rule", MOST.values(), ids=MOST)


def make(device, rule, gate="usual", **sizes):
    """Random inputs; λ has either sign. Under a gate per channel, what is special about a gate is so on some channels."""
    x = cases.make(device, DELTA if rule.delta else DECAY, gate=gate, **{"H": HEADS, **sizes})
    if not rule.channel:
        return x
    generator = torch.Generator("cpu").manual_seed(11)
    uniform, chance = (torch.rand(*x["v"].shape[:3], x["q"].shape[3], generator=generator) for _ in range(2))
    odd = {"strong": -100 * uniform, "very negative": -1e4 * uniform, "reset": torch.full_like(uniform, float("-inf"))}
    few = 0.2 if gate == "very negative" else 0.02
    g = torch.where(chance < few, odd[gate], -0.2 * uniform) if gate in odd else -0.2 * uniform
    return x | {"g": g.to(device)}


def tokens(x, start, end):
    return {name: None if y is None else y[:, start:end] for name, y in x.items()}


def rows(x, b):
    return {name: None if y is None else y[b : b + 1] for name, y in x.items()}


def full(x, scale=1.0, state=None):
    """o in float64 and the state after the last token, by the chunkwise form."""
    x = {name: None if y is None else y.double() for name, y in x.items()}
    g = torch.zeros_like(x["v"][..., 0]) if x["g"] is None else x["g"]
    q = x["q"] * scale
    return chunkwise(q, x["k"], x["v"], g, x["level_scales"], x.get("beta"), chunk_size=C, state=state)


def start(x, length=0, entry_dtype=torch.float32, max_context=512 * C):
    """The decoding state after the first tokens of x."""
    before = full(tokens(x, 0, length))[1]
    return DecodingState.from_state(before, max_context, entry_dtype, dtype=x["v"].dtype)


def step(x, state, scale=1.0, **kwargs):
    """One call of the kernels, and the positions after it."""
    o = decoding.step(**x, state=state, scale=scale, **kwargs)
    state.position += x["v"].shape[1]
    return o


def steps(x, state, sizes=(1,), scale=1.0, **kwargs):
    outputs, first = [], 0
    while first < x["v"].shape[1]:
        last = first + sizes[len(outputs) % len(sizes)]
        outputs.append(step(tokens(x, first, last), state, scale, **kwargs))
        first = last
    return torch.cat(outputs, 1)


def check(x, length, sizes=(1,), bar=FLOAT32, scale=0.7, entry_dtype=torch.float32):
    """The tokens after ``length``, and the state after them, against one pass."""
    want, final = full(x, scale)
    state = start(x, length, entry_dtype)
    got = steps(tokens(x, length, x["v"].shape[1]), state, sizes, scale)
    assert got.isfinite().all()
    error = relative(got, want[:, length:])
    assert error <= bar, f"o has relative error {error:.2e} > {bar:.2e} after {length} tokens"
    back = state.to_state()
    slots = final.entries.shape[2]
    assert torch.equal(back.position, final.position)
    held = [y.entries[:, :, :slots] * y.decay[:, :, :slots, None, None].exp() for y in (back, final)]
    assert relative(*held) <= bar or held[1].norm() == 0
    for name in ("open_k", "open_v", "open_g"):
        assert torch.equal(getattr(back, name), getattr(final, name).float())


@all_rules
@pytest.mark.parametrize("length", PREFILLS)
def test_prefill_then_steps_is_one_pass(device, rule, length):
    check(make(device, rule, T=length + STEPS), length)


@rules
def test_several_tokens_a_call(device, rule):
    """A call that closes a chunk with its first token, its last, or one between, and goes on in the next."""
    check(make(device, rule, T=4 * C + 5), 3 * C - 1, (1, 2, C, 3))


@pytest.mark.gpu
@rules
def test_nothing_has_drifted_after_300_000_tokens(device, rule):
    """A chunk a call, from a prefill of 1,000 tokens on; the scalar gate forgets over a hundred thousand tokens."""
    x = make(device, rule, T=301_000, H=1, K=16, V=16, L=20)
    if not rule.delta:
        x["g"] *= 1e-4
    want, final = full(x)
    state = start(x, 1000, max_context=301_000)
    got = steps(tokens(x, 1000, 301_000), state, (C,))
    for part in (slice(None), slice(-1000, None)):
        error = relative(got[:, part], want[:, 1000:][:, part])
        assert error <= FLOAT32, f"o has relative error {error:.2e} > {FLOAT32:.2e}"
    back = state.to_state()
    held = [y.entries * y.decay[..., None, None].exp() for y in (back, final)]
    slots = held[1].shape[2]
    assert relative(held[0][:, :, :slots], held[1]) <= FLOAT32


@rules
def test_a_row_does_not_see_its_batch(device, rule):
    lengths = (2, C - 2, 4 * C - 1)
    x = make(device, rule, B=3, T=4 * C + 6)
    alone = [start(rows(x, b), length) for b, length in enumerate(lengths)]
    together = DecodingState.stack(alone)
    new = tokens(make(device, rule, B=3, T=3, seed=1), 0, 3)
    got = steps(new, together, (1, 2))
    for b, state in enumerate(alone):
        assert torch.equal(got[b : b + 1], steps(rows(new, b), state, (1, 2)))
        for ours, theirs in zip(together.split()[b].to_state()._tensors(), state.to_state()._tensors()):
            assert torch.equal(ours, theirs)


def paged(state, index, pages):
    """(``state`` whose row b is page ``index[b]`` of ``pages``, the pages). Other bytes have all bits set: NaN, position -1."""
    sizes = {name: -(-x[0].numel() * x.element_size() // 64) * 64 for name, x in state._named()}
    memory = torch.full((pages, sum(sizes.values())), -1, dtype=torch.int8, device=index.device)
    tensors = {}
    for (name, x), part in zip(state._named(), memory.split(list(sizes.values()), 1)):
        whole = part[:, : x[0].numel() * x.element_size()].view(x.dtype)
        tensors[name] = whole.view(pages, *x.shape[1:])
        tensors[name][index] = x
    return dataclasses.replace(state, **tensors), memory


@rules
def test_rows_of_a_state_by_index(device, rule):
    """Pages in another order than the rows, and more of them: the same results, and no byte of another page is touched."""
    lengths, index = (2, C - 2, 4 * C - 1), torch.tensor([3, 0, 4], device=device)
    x = make(device, rule, B=3, T=4 * C + 6, H=2, K=16, V=16)
    state = DecodingState.stack([start(rows(x, b), length) for b, length in enumerate(lengths)])
    held, memory = paged(state, index, 6)
    for first, last in ((0, 1), (1, 3)):
        new = tokens(x, first, last)
        got = decoding.step(**new, state=held, scale=0.7, rows=index)
        assert same(got, step(new, state, 0.7))
        held.position[index] += last - first
    for ours, theirs in zip(held.reorder(index).to_state()._tensors(), state.to_state()._tensors()):
        assert same(ours, theirs)
    assert (memory[[1, 2, 5]] == -1).all()


def same(one, other):
    """Bit for bit, but on a GPU, where other distances of rows are another kernel."""
    return torch.equal(one, other) or (not INTERPRETED and relative(one, other) < FLOAT32)


@rules
@pytest.mark.parametrize("groups", [2] if INTERPRETED else [1, 2, 4])
def test_groups(device, rule, groups):
    check(make(device, rule, T=C + 1, H=4, G=groups), C - 1, (2,))


WIDTHS = [(24, 40)] if INTERPRETED else [(16, 16), (96, 96), (128, 64), (192, 384), (256, 256), (1, 1)]


@rules
@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_widths(device, rule, K, V):
    """Several programs share a head, and a call goes on after closing the chunk: the interpreter runs the first of them to
    its end before the next begins, so one that read what another writes would be wrong."""
    check(make(device, rule, T=4 * C + 1, K=K, V=V), 4 * C - 1, (2,))


@all_rules
@pytest.mark.parametrize("gate", ["none", "strong", "very negative", "reset"])
def test_gates(device, rule, gate):
    if gate == "none" and rule.channel:
        pytest.skip("without a gate it is the scalar gate")
    if gate == "strong" and INTERPRETED:
        pytest.skip("between the others")
    check(make(device, rule, T=4 * C + 4, gate=gate), 4 * C - 5, (9,))


@rules
def test_a_reset_forgets_exactly(device, rule):
    x = make(device, rule, T=2 * C + 4)
    x["g"][:, 2 * C - 2] = float("-inf")
    other = x | {"v": x["v"].clone()}
    other["v"][:, : 2 * C - 2] *= 1000
    outputs = [steps(tokens(y, 2 * C - 3, 2 * C + 4), start(y, 2 * C - 3), (7,)) for y in (x, other)]
    assert torch.equal(outputs[0][:, 1:], outputs[1][:, 1:])
    assert not torch.equal(outputs[0][:, :1], outputs[1][:, :1])


@rules
@pytest.mark.parametrize("L", [1, 6] if INTERPRETED else [1, 3, 6])
def test_levels_past_the_last_share_it(device, rule, L):
    check(make(device, rule, T=7 * C + 4, L=L), 7 * C + 2)


@rules
@pytest.mark.parametrize("low_entries", [False, True])
def test_low_precision_is_within_twice_of_plain_torch(device, rule, low_entries):
    if low_entries and INTERPRETED:
        pytest.skip("entries of 16 bits are bfloat16, which the interpreter does not have")
    T = 6 * C + 1
    x = make(device, rule, T=T, dtype=BFLOAT16)
    length = T - 4 if INTERPRETED else 0
    plain = plain_torch(**x, scale=0.7)[:, length:]
    bar = LOW_PRECISION_FACTOR * relative(plain, full(x, 0.7)[0][:, length:])
    check(x, length, bar=bar, entry_dtype=torch.bfloat16 if low_entries else torch.float32)


@rules
def test_what_is_dead_is_never_read(device, rule):
    used = C - 2
    length = 5 * C + used  # chunk 101₂ is open
    x = make(device, rule, T=length + 4)
    clean = start(x, length, max_context=16 * C)
    dirty = clean.clone()
    dirty.entries[:, :, [1, 3, 4]] = torch.nan
    dirty.open_v[:, :, used:] = torch.nan
    for ring in (dirty.open_k, dirty.open_g, dirty.open_solve):
        if ring is not None:
            ring[:, :, :C] = torch.nan
            ring[:, :, C + used :] = torch.nan
    if dirty.decay is not None:
        dirty.decay[..., [1, 3, 4]] = torch.nan
        dirty.decay[:, 0] = torch.nan
    new = tokens(x, length, length + 4)
    assert torch.equal(steps(new, dirty, (1, 3)), steps(new, clean, (1, 3)))
    for ours, theirs in zip(dirty.to_state()._tensors(), clean.to_state()._tensors()):
        assert torch.equal(ours, theirs)


@rules
def test_nothing_is_written_past_the_slots(device, rule):
    """A row beyond max_context is the caller's mistake; its neighbours' entries stay whole."""
    x = make(device, rule, T=2 * C, H=2)
    state = start(x, 2 * C - 1, max_context=2 * C - 1)
    assert state.entries.shape[2] == 1
    before = state.entries.clone()
    step(tokens(x, 2 * C - 1, 2 * C), state)
    assert torch.equal(state.entries, before)


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if rule.delta])
def test_unit_length_of_queries_and_keys(device, rule):
    x = make(device, rule, T=C + 3, K=24)
    x["k"] *= 3.0
    unit = {name: x[name] * torch.rsqrt(x[name].square().sum(-1, keepdim=True) + 1e-6) for name in ("q", "k")}
    state = start(x | unit, C - 3)
    got = steps(tokens(x, C - 3, C + 3), state, (2, 4), normalize=True)
    assert relative(got, full(x | unit)[0][:, C - 3 :]) < FLOAT32
    assert relative(state.to_state().open_k, full(x | unit)[1].open_k) < FLOAT32


@rules
def test_strided_inputs(device, rule):
    """Slices of a fused projection are read where they lie, in other vectors on a GPU; transposed ones are copied."""
    x = make(device, rule, B=2, T=2)
    names = [name for name in x if name != "level_scales"]
    fused = torch.cat([x[name].flatten(2) for name in names], dim=2)
    parts = fused.split([x[name].flatten(2).shape[2] for name in names], dim=2)
    sliced = {name: part.view(x[name].shape) for name, part in zip(names, parts)}
    transposed = {name: y.transpose(1, 2).contiguous().transpose(1, 2) for name, y in x.items()}
    expected = step(x, start(x))
    assert torch.equal(step(transposed, start(x)), expected)
    got = step(x | sliced, start(x))
    assert relative(got, expected) < FLOAT32
    assert torch.equal(got, expected) or not INTERPRETED


@all_rules
def test_the_same_as_the_plain_form(device, rule):
    """Both forms hold one state: a row may go on with either."""
    x = make(device, rule, T=C + 4)
    first, second = start(x, C - 2), start(x, C - 2)
    new = tokens(x, C - 2, C + 4)
    got = steps(new, first, (3,))
    assert relative(got, plain_step(**new, state=second)) < FLOAT32
    second.position += 6
    for ours, theirs in zip(first.to_state()._tensors(), second.to_state()._tensors()):
        assert relative(ours, theirs) < FLOAT32 or theirs.double().norm() == 0


@rules
def test_nothing_to_do(device, rule):
    x = make(device, rule, B=0, T=1)
    assert step(x, start(x)).shape == x["v"].shape


@pytest.mark.gpu
@rules
def test_replayed_by_a_graph(device, rule):
    """One captured step serves every position, closings included; ``restore_`` takes it back."""
    T = 2 * C + 5
    x = make(device, rule, B=2, T=T, K=128, V=64, dtype=torch.bfloat16)
    state, eager = start(x), start(x)
    now = {name: y.clone() for name, y in tokens(x, 0, 1).items()}
    step(now, state)  # compiles
    state.restore_(eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step(now, state)
    state.restore_(eager)
    snapshot = state.clone()
    for _ in range(2):
        for t in range(T):
            for name, y in now.items():
                y.copy_(x[name][:, t : t + 1])
            graph.replay()
            assert torch.equal(o, step({name: y.clone() for name, y in now.items()}, eager))
        state.restore_(snapshot)
        eager = start(x)


@pytest.mark.gpu
@rules
def test_public_steps_run_the_kernels(device, rule, monkeypatch):
    import loglinear
    from loglinear.ops import step as public

    monkeypatch.setattr(public, "step", None)
    x = make(device, rule, T=3, dtype=torch.bfloat16)
    state = start(x)
    op = loglinear.log_linear_delta_rule_step if rule.delta else loglinear.log_linear_attention_step
    assert torch.equal(op(**x, state=state), step(x, start(x)))
    assert state.position.tolist() == [3] * len(state.position)
