"""States: continuing from any split is the single pass, gradients included, and a state stays O(log T) and untouched."""

import copy
import dataclasses

import pytest
import torch
from calls import KINDS, C, both_rules, fields, inputs, kinds, meaning, output, rows, run, tokens

from loglinear import LogLinearState, fenwick
from oracle import SAME_NUMBERS, error, gradients

all_kinds = kinds()
tree_kinds = kinds("scalar", "delta")
both_states = kinds("scalar", "delta", "linear delta")

T = 5 * C + 10
SPLITS = {
    "two prefills": [C + 30],
    "at chunk borders": [C, 2 * C, 4 * C],
    "around a chunk border": [C - 1, C, C + 1],
    "token by token over a merge": list(range(4 * C - 3, 4 * C + 3)),
    "several tokens at a time": list(range(0, T, 27)),
    "prefill, tokens, prefill": [100, 101, 102, 110, 3 * C + 5],
    "nothing first, nothing last": [0, 0, 77, 77, T],
}
# Every split of four kinds, and two splits of the others.
MANY = ("scalar", "delta", "channels, delta, resets", "linear scalar")
FEW = ("around a chunk border", "prefill, tokens, prefill")
SPLIT = [(kind, name) for kind in KINDS for name in (SPLITS if kind in MANY else FEW)]


def in_pieces(x, splits, **kwargs):
    """o and the final state of the pass cut at ``splits``."""
    state, parts = None, []
    for left, right in zip([0, *splits], [*splits, x["v"].shape[1]]):
        part, state = run(tokens(x, left, right), state, **kwargs)
        parts.append(part)
    return torch.cat(parts, 1), state


@pytest.mark.parametrize(("kind", "splits"), SPLIT)
def test_any_split_is_the_single_pass(kind, splits):
    """Outputs, final state, and the gradients through both with respect to every input, across all states between."""
    x = inputs(**KINDS[kind], B=1, T=T, H=2, G=1, grad=True)
    o, state = run(x)
    cut_o, cut = in_pieces(x, SPLITS[splits])
    assert torch.equal(cut.position, state.position)
    assert state.position.tolist() == [T]
    assert error(cut_o, o) <= SAME_NUMBERS
    for have, want in zip(meaning(cut), meaning(state), strict=True):
        assert error(have, want) <= SAME_NUMBERS
    wanted = gradients([o, *meaning(state)], x.values())
    for name, have, want in zip(x, gradients([cut_o, *meaning(cut)], x.values()), wanted):
        assert have.isfinite().all(), name
        assert error(have, want) <= SAME_NUMBERS, name


@all_kinds
def test_rows_at_different_positions(kind):
    """A state whose rows stand at 0, 5, C, … tokens goes on as each row would alone; gradients reach every row's past."""
    past, more = [0, 5, C, C + 3, 2 * C - 1, 3 * C], 70
    whole = [inputs(**kind, B=1, T=n + more, seed=n, grad=True) for n in past]
    packed = {name: torch.cat([x[name][:, :n] for x, n in zip(whole, past)], 1) for name in whole[0]}
    new = {name: torch.cat([x[name][:, n:] for x, n in zip(whole, past)], 0) for name in whole[0]}
    _, state = run(packed, cu_seqlens=torch.tensor([0, *past]).cumsum(0))
    assert state.position.tolist() == past
    o, state = run(new, state)
    assert state.position.tolist() == [n + more for n in past]
    for i, (x, n) in enumerate(zip(whole, past)):
        alone, alone_state = run(x)
        want = [alone[:, n:], *meaning(alone_state)]
        have = [o[[i]], *meaning(state.reorder(torch.tensor([i])))]
        if not kind.get("linear"):  # a row has the slots of its longest neighbour; those beyond its own are empty
            slots = alone_state.entries.shape[2]
            assert have[1][:, :, slots:].eq(0).all()
            have[1] = have[1][:, :, :slots]
        assert max(error(*pair) for pair in zip(have, want, strict=True)) <= SAME_NUMBERS, n
        for name, *pair in zip(x, gradients(have, x.values()), gradients(want, x.values())):
            assert error(*pair) <= SAME_NUMBERS, (n, name)


@tree_kinds
def test_gradients_of_the_state_s_own_tensors(kind):
    """gradcheck through entries, decay and the open tokens of two rows at different positions, dead slots included."""
    x = inputs(**kind, B=1, T=C + 2 + 3 * C + 1, H=2, G=1, K=2, V=2)
    _, state = run(x, cu_seqlens=torch.tensor([0, C + 2, 4 * C + 3]))
    new = inputs(**kind, B=2, T=C, H=2, G=1, K=2, V=2, seed=1)
    leaves = {n: value.detach().requires_grad_() for n, value in fields(state).items() if n != "position"}
    assert set(leaves) == {"entries", "decay", "open_k", "open_v", "open_g"} | ({"open_beta"} & set(fields(state)))

    def continued(*values):
        o, final = run(new, dataclasses.replace(state, **dict(zip(leaves, values))))
        return o, *meaning(final)

    assert torch.autograd.gradcheck(continued, tuple(leaves.values()), fast_mode=True)
    before = [value.clone() for value in leaves.values()]
    slow = gradients(continued(*leaves.values()), leaves.values())
    assert all(torch.equal(value, old) for value, old in zip(leaves.values(), before))
    alive = dict(zip(leaves, slow))
    assert all(gradient.isfinite().all() and gradient.norm() > 0 for gradient in slow)
    assert (alive["open_k"][0, :, 2:] == 0).all()  # tokens that do not exist
    assert (alive["entries"][0, :, 1:] == 0).all()  # buckets that do not exist: position // C is 1


@tree_kinds
def test_a_bucket_is_its_matrix_times_the_exponential_of_its_log(kind):
    """How a value is split between ``entries`` and ``decay`` must not matter, in reading, merging and keeping it."""
    x = inputs(**kind, B=2, T=6 * C + 7)
    _, state = run(tokens(x, 0, 3 * C + 5))
    shift = torch.rand_like(state.decay)
    moved = dataclasses.replace(state, entries=state.entries * shift.exp()[..., None, None], decay=state.decay - shift)
    for new in (1, C, 3 * C + 2):
        (o, final), (expected, wanted) = (run(tokens(x, 3 * C + 5, 3 * C + 5 + new), s) for s in (moved, state))
        assert error(o, expected) <= SAME_NUMBERS
        assert max(map(error, meaning(final), meaning(wanted))) <= SAME_NUMBERS


def test_gradients_of_the_linear_state_s_own_tensor():
    new = inputs("delta", linear=True, B=2, T=3, K=2, V=2)
    _, state = run(inputs("delta", linear=True, B=2, T=9, K=2, V=2, seed=1))
    leaf = state.state.detach().requires_grad_()

    def continued(value):
        o, final = run(new, dataclasses.replace(state, state=value))
        return o, final.state

    assert torch.autograd.gradcheck(continued, (leaf,))


# ------------------------------------------------------------------------------------------------- state as a value


@both_states
def test_a_state_is_never_written_to_and_shares_nothing(kind):
    """Continuing leaves the given state's bits alone, and overwriting any state reaches no other tensor."""
    for n, more in ((3, 1), (C, 0), (C, 1), (C + 5, 0), (C + 5, C), (3 * C - 1, 1)):
        x = inputs(**kind, B=2, T=n + more)
        expected = output(x)[:, n:]
        first = tokens(x, 0, n)
        given = run(first)[1]
        before, versions = copy.deepcopy(fields(given)), {name: t._version for name, t in fields(given).items()}
        o, final = run(tokens(x, n, n + more), given)
        assert all(torch.equal(t, before[name]) and t._version == versions[name] for name, t in fields(given).items())
        for tensor in fields(final).values():
            tensor.fill_(77)
        assert all(torch.equal(t, before[name]) for name, t in fields(given).items()), (n, more)
        for tensor in fields(given).values():
            tensor.fill_(77)
        again, later = run(tokens(x, n, n + more), run(first)[1])
        assert later.position.tolist() == [n + more] * 2
        assert error(o, expected) <= SAME_NUMBERS
        assert torch.equal(again, o)


@both_states
@pytest.mark.parametrize("index", [[1, 1, 0], [2, 0], [], [0, 1, 2]])
def test_reorder_is_the_rows_in_that_order(kind, index):
    past, new = inputs(**kind, B=3, T=2 * C + 7), inputs(**kind, B=3, T=4, seed=1)
    _, state = run(past)
    moved = state.reorder(torch.tensor(index, dtype=torch.int64))
    assert type(moved) is type(state)
    assert moved.batch_size == len(index)
    o, final = run(rows(new, index), moved)
    for i, source in enumerate(index):
        pair = {name: torch.cat([past[name][[source]], new[name][[source]]], 1) for name in past}
        alone, alone_state = run(pair)
        assert error(o[[i]], alone[:, -4:]) <= SAME_NUMBERS
        for have, want in zip(meaning(final), meaning(alone_state)):
            assert error(have[[i]], want) <= SAME_NUMBERS


@both_states
def test_to_another_dtype_and_device(kind):
    """bfloat16 keys, values and states, float32 logs, int64 positions; going on costs the rounding of what is stored."""
    n, x = 3 * C + 11, inputs(**kind, T=4 * C, K=16, V=16, dtype=torch.float32)
    _, state = run(tokens(x, 0, n))
    half = state.to(dtype=torch.bfloat16)
    for name, tensor in fields(half).items():
        original = getattr(state, name)
        if name in ("position", "decay", "open_g"):
            assert tensor.dtype == original.dtype == (torch.int64 if name == "position" else torch.float32)
            assert torch.equal(tensor, original)
        else:
            assert torch.equal(tensor, original.bfloat16())
    expected = output(x)[:, n:]
    assert 0 < error(run(tokens(x, n, 4 * C), half)[0], expected) <= 2e-3  # measured below 7e-4
    double = {name: tensor.double() for name, tensor in x.items()}
    assert error(run(tokens(double, n, 4 * C), state.to(dtype=torch.float64))[0], output(double)[:, n:]) <= 1e-6
    away = state.to("meta")
    assert away.device.type == "meta"
    assert all(tensor.device.type == "meta" for tensor in fields(away).values())
    assert away.nbytes == state.nbytes
    assert state.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_of_a_new_state(dtype):
    """Whatever the inputs' dtype a state accumulates in float32, or in float64 for float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for kind in (KINDS["delta"], KINDS["linear delta"]):
        _, state = run(inputs(**kind, T=C + 1, dtype=dtype))
        assert {t.dtype for name, t in fields(state).items() if name != "position"} == {wide}
        assert state.position.dtype == torch.int64


# -------------------------------------------------------------------------------------------------- size of a state


@both_rules
def test_bytes_grow_with_the_logarithm_to_a_million_tokens(gate):
    """From 1 to 2^20 tokens by repeated continuing. With q·k = v = λ = 1 a live slot m counts its 2^m·C tokens exactly.

    Keys of length 2^-20 make the delta rule an addition: 1 - 2^-40 is 1 in float32.
    """
    piece, length = 1 << 16, 1.0 if gate == "scalar" else 2.0**-20
    ones = torch.ones(1, piece, 1, 1)
    x = {"q": ones / length, "k": ones * length, "v": ones, "level_scales": ones}
    if gate == "delta":
        x["beta"] = ones[..., 0]
    # position; keys and values (1 + 1), gate (1) and β of the open chunk
    fixed = 8 + 4 * C * (3 if gate == "scalar" else 4)
    seen, state, sizes = 0, None, {}
    while seen < 1 << 20:
        new = min(max(seen, 1), piece)
        with torch.no_grad():
            o, state = run(tokens(x, 0, new), state)
        seen += new
        chunks = seen // C
        assert o[0, -1].item() == seen
        assert state.position.tolist() == [seen]
        slots = state.entries.flatten() / length
        assert slots.tolist() == [(1 << m) * C if chunks >> m & 1 else 0 for m in range(len(slots))]
        assert state.entries.count_nonzero() == chunks.bit_count()
        assert len(slots) <= chunks.bit_length()
        sizes[seen] = state.nbytes
        assert state.nbytes == fixed + 2 * 4 * len(slots)  # entries and their logs
    assert sizes[1 << 20] == fixed + 8 * 15
    assert sizes[1] == sizes[C // 2] == fixed
    for exponent in range(7, 17):  # one slot more for each doubling, no more
        assert sizes[2 << exponent] - sizes[1 << exponent] == 8


def test_slots_are_the_query_path():
    """Live and dead slots of rows everywhere between 0 and 40 chunks; dead ones and dead open tokens hold zeros."""
    lengths = [n * C + n % 7 for n in range(40)]
    x = inputs("delta", B=1, T=sum(lengths), H=1, G=1, K=2, V=2)
    _, state = run(x, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    assert isinstance(state, LogLinearState)
    assert state.chunk_size == C
    for row, length in enumerate(lengths):
        live = {fenwick.lowbit(e).bit_length() - 1 for e in fenwick.query_path(length // C)}
        for slot in range(state.entries.shape[2]):
            assert state.entries[row, :, slot].ne(0).any() == (slot in live), (row, slot)
            assert slot in live or state.decay[row, :, slot].eq(0).all()
        for name in ("open_k", "open_v", "open_g", "open_beta"):
            tokens_live = getattr(state, name)[row].transpose(0, 1).flatten(1).ne(0).any(1).tolist()
            assert tokens_live == [i < length % C for i in range(C)], (row, name)
