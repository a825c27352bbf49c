"""Row operations of a ``DecodingState``: what serving does between steps. Each is checked by what the next steps give."""

import dataclasses

import pytest
import torch
from calls import C, inputs, rows, tokens
from calls import run as full
from test_step import assert_states_equal, empty, poisoned, prefilled, relative, steps
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from loglinear import DecodingState, LinearState, decoding_state
from loglinear.layers import KVState, LogLinearMamba2, RecurrentMixerState, recurrence

GATES = ("scalar", "delta")
LENGTHS = (0, C - 1, 3 * C + 5)
NEW = {gate: inputs(gate, B=len(LENGTHS), T=C + 2, dtype=torch.float32) for gate in GATES}


@pytest.fixture(params=GATES)
def gate(request):
    return request.param


@pytest.fixture
def state(gate):
    """Rows at three positions."""
    x = inputs(gate, B=len(LENGTHS), T=4 * C, dtype=torch.float32)
    return DecodingState.stack([prefilled(rows(x, [b]), length) for b, length in enumerate(LENGTHS)])


def assert_same(a, b):
    names = [field.name for field in dataclasses.fields(a)]
    for name in names:
        x, y = getattr(a, name), getattr(b, name)
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name


def addresses(state):
    return [tensor.data_ptr() for tensor in state._tensors()]


def test_a_step_updates_in_place_and_allocates_nothing(state, gate):
    before = addresses(state)
    size = state.nbytes
    steps(NEW[gate], state, (1, 64))
    assert addresses(state) == before
    assert state.nbytes == size
    assert state.position.tolist() == [length + C + 2 for length in LENGTHS]


def test_forks_go_on_each_by_itself(state, gate):
    fork = state.reorder(torch.tensor([2, 0, 2]))
    assert fork.position.tolist() == [LENGTHS[2], 0, LENGTHS[2]]
    got = steps(NEW[gate], fork)
    for b, source in enumerate((2, 0, 2)):
        one = state.split()[source]
        assert torch.equal(got[b : b + 1], steps(rows(NEW[gate], [b]), one))
    assert state.position.tolist() == list(LENGTHS)


def test_copied_rows_replace_others_in_place(state, gate):
    other = state.clone()
    steps(rows(NEW[gate], [0, 1, 2]), other)
    want = [other.split()[2], state.split()[1], other.split()[0]]
    before = addresses(state)
    assert state.copy_rows_(torch.tensor([0, 2]), other, torch.tensor([2, 0])) is state
    assert addresses(state) == before
    assert_same(state, DecodingState.stack(want))


def test_rows_copied_within_a_state(state):
    want = DecodingState.stack([state.split()[b] for b in (2, 1, 0)])
    state.copy_rows_(torch.tensor([0, 2]), state, torch.tensor([2, 0]))
    assert_same(state, want)


def test_a_snapshot_is_restored_in_place(state, gate):
    snapshot, before = state.clone(), addresses(state)
    assert not set(addresses(snapshot)) & set(before)
    first = steps(NEW[gate], state, (5,))
    assert state.restore_(snapshot) is state
    assert addresses(state) == before
    assert_same(state, snapshot)
    assert torch.equal(steps(NEW[gate], state, (5,)), first)


def test_split_and_stack_are_inverse_and_copy(state, gate):
    parts = state.split()
    assert [part.position.tolist() for part in parts] == [[length] for length in LENGTHS]
    assert_same(DecodingState.stack(parts), state)
    steps(NEW[gate], DecodingState.stack(parts))
    steps(rows(NEW[gate], [1]), parts[1])
    assert state.position.tolist() == list(LENGTHS)
    assert parts[0].position.tolist() == [0]


def test_stack_takes_the_slots_of_the_largest(state, gate):
    small, large = state.split()[1], state.split()[2].grow(C << 9)
    joined = DecodingState.stack([small, large])
    assert joined.max_context == large.max_context > state.max_context
    got = steps(rows(NEW[gate], [1, 2]), joined)
    assert torch.equal(got[:1], steps(rows(NEW[gate], [1]), small))


def test_grown_goes_on_alike(gate):
    x = inputs(gate, T=3 * C, dtype=torch.float64)
    state = empty(tokens(x, 0, 1), max_context=C)
    assert (state.entries.shape[2], state.max_context) == (1, 2 * C - 1)
    first = steps(tokens(x, 0, C + 5), state)
    grown = state.grow(3 * C)
    assert (grown.entries.shape[2], state.entries.shape[2], grown.grow(1).entries.shape[2]) == (2, 1, 2)
    assert not set(addresses(grown)) & set(addresses(state))
    got = torch.cat([first, steps(tokens(x, C + 5, 3 * C), grown)], 1)
    assert relative(got, full(x)[0]) < 1e-10


def test_saved_and_loaded(state, gate, tmp_path):
    state.save(tmp_path / "state.pt")
    loaded = DecodingState.load(tmp_path / "state.pt", device="cpu")
    assert_same(loaded, state)
    assert torch.equal(steps(NEW[gate], loaded), steps(NEW[gate], state))


def test_a_file_of_the_first_layout_is_loaded(tmp_path):
    """Names, axes and dtypes of files that exist, written out here: one row after C + 1 tokens of the delta rule."""
    sizes = {"entries": (1, 2, 1, 3, 5), "open_k": (1, 1, 2 * C, 3), "open_v": (1, 2, C, 5), "open_g": (1, 2, 2 * C)}
    sizes["open_solve"] = (1, 2, 2 * C, C)
    content = {name: torch.randn(size) for name, size in sizes.items()} | {"chunk_size": C}
    content["open_g"] = -content["open_g"].abs()
    torch.save(content | {"position": torch.tensor([C + 1])}, tmp_path / "state.pt")
    state = DecodingState.load(tmp_path / "state.pt").to_state()
    assert torch.equal(state.entries, content["entries"])
    assert torch.equal(state.open_k[:, :, 0], content["open_k"][:, :, C])
    assert torch.equal(state.open_beta[:, :, 0], content["open_solve"][:, :, C, 0])


def test_to_keeps_logs_wide(state):
    low = state.to(dtype=torch.bfloat16)
    kinds = {name: value.dtype for name, value in low._named()}
    assert kinds.pop("position") == torch.int64
    assert {name for name, kind in kinds.items() if kind == torch.bfloat16} == {"entries", "open_k", "open_v"}
    assert_same(state.to("cpu"), state)


def test_bytes_of_a_layer():
    """48 heads of 128 x 64 at 131,072 tokens: 12 slots of 1.5 MB, and 0.5 MB for the open chunk."""
    sizes = dict(batch=1, heads=48, groups=1, key_width=128, value_width=64, max_context=131072, dtype=torch.bfloat16)
    state = DecodingState.empty(**sizes, device="meta")
    assert state.entries.nbytes == 12 * 48 * 128 * 64 * 4
    assert state.nbytes - state.entries.nbytes < 0.5e6
    half = DecodingState.empty(**sizes, device="meta", entry_dtype=torch.bfloat16)
    assert half.entries.nbytes * 2 == state.entries.nbytes


@pytest.mark.parametrize("length", [0, 1, C - 1, C, 5 * C + 9])
def test_there_and_back(gate, length):
    """An ordinary state is the same after the way through a decoding state, dead parts full of NaN or not."""
    x = inputs(gate, T=length + 1, dtype=torch.float64)
    want = full(tokens(x, 0, length))[1]
    made = DecodingState.from_state(want, 4096)
    assert_states_equal(made.to_state(), want, 1e-13)
    assert_states_equal(poisoned(made).to_state(), want, 1e-13)
    got, _ = full(tokens(x, length, length + 1), made.to_state())
    assert relative(got, full(x)[0][:, length:]) < 1e-10


ROWS = torch.tensor([0])
CALLS = {
    "no room": (lambda s: DecodingState.from_state(s.to_state(), 100), ValueError, "max_context must be at least"),
    "not a state": (lambda s: DecodingState.from_state(s, 4096), TypeError, "state must be a LogLinearState"),
    "max_context of 0": (lambda s: s.grow(0), ValueError, "max_context must be an int of at least 1: got 0"),
    "max_context a float": (lambda s: s.grow(1e6), ValueError, "max_context must be an int"),
    "index of another dtype": (lambda s: s.copy_rows_(ROWS.int(), s, ROWS), TypeError, "index must be an int64 tensor"),
    "index of two axes": (lambda s: s.reorder(ROWS[None]), TypeError, "index must be an int64 tensor of one axis"),
    "fewer rows": (lambda s: s.copy_rows_(ROWS, s, ROWS[:0]), ValueError, "other_index must have as many rows"),
    "other sizes": (lambda s: s.copy_rows_(ROWS, s.grow(C << 9), ROWS), ValueError, "other must have the sizes"),
    "other kind": (lambda s: s.restore_(s.to_state()), TypeError, "snapshot must be a DecodingState"),
    "other batch": (lambda s: s.restore_(s.split()[0]), ValueError, "snapshot must have the sizes of this state"),
    "nothing to stack": (lambda s: DecodingState.stack([]), ValueError, "states must hold at least one"),
    "heads": (lambda s: DecodingState.empty(1, 3, 2, 4, 4, 9, torch.float32), ValueError, "heads must be a multiple"),
    "chunk": (lambda s: DecodingState.empty(1, 2, 2, 4, 4, 9, torch.float32, chunk_size=24), ValueError, "chunk_size"),
    "dtype": (
        lambda s: DecodingState.empty(1, 2, 2, 4, 4, 9, torch.int64),
        TypeError,
        "dtype must be float64, float32",
    ),
}
EMPTY = (1, 2, 2, 4, 4, 9)


@pytest.mark.parametrize("case", CALLS)
def test_wrong_calls(case, state):
    call, error, message = CALLS[case]
    with pytest.raises(error, match=message):
        call(state)


# (argument, what it may be, a call with another).
TOO_NARROW = [
    ("dtype", "float64, float32, bfloat16 or float16", lambda s, low: DecodingState.empty(*EMPTY, low)),
    ("dtype", "float64, float32, bfloat16 or float16", lambda s, low: DecodingState.from_state(s.to_state(), 4096, dtype=low)),
    ("dtype", "float64, float32, bfloat16 or float16", lambda s, low: mixer_state(s).for_decoding(4096, dtype=low)),
    ("dtype", "float64, float32, bfloat16 or float16",
     lambda s, low: KVState(torch.tensor([2]), *torch.zeros(2, 1, 2, 1, 4)).for_decoding(4096, dtype=low)),
    # Entries are sums: of 8 bits they were wrong by half, and float16 ends at 65,504.
    ("entry_dtype", "float32 or bfloat16", lambda s, low: DecodingState.empty(*EMPTY, torch.float32, low)),
    ("entry_dtype", "float32 or bfloat16", lambda s, low: DecodingState.from_state(s.to_state(), 4096, low)),
    ("entry_dtype", "float32 or bfloat16", lambda s, low: mixer_state(s).for_decoding(4096, low)),
    ("dtype", "float64, float32 or bfloat16", lambda s, low: s.to(dtype=low)),
    ("dtype", "float64, float32 or bfloat16", lambda s, low: s.to_state().to(dtype=low)),
    ("dtype", "float64, float32 or bfloat16", lambda s, low: mixer_state(s).to(dtype=low)),
    ("dtype", "float64, float32 or bfloat16", lambda s, low: LinearState(ROWS, torch.zeros(1, 2, 4, 4)).to(dtype=low)),
]  # fmt: skip


def mixer_state(state):
    return RecurrentMixerState(torch.zeros(3, 3, 8), state.to_state())


@pytest.mark.parametrize(("name", "wanted", "call"), TOO_NARROW)
def test_too_few_bits_or_too_small_a_range_are_refused(name, wanted, call, state):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.float16):
        if str(dtype).removeprefix("torch.") not in wanted.replace(",", "").split():
            with pytest.raises(TypeError, match=f"{name} must be {wanted}: got {dtype}"):
                call(state, dtype)


def test_keys_and_values_may_be_float16():
    """They are no sums."""
    keys = KVState(torch.tensor([2]), *torch.ones(2, 1, 2, 1, 4))
    assert keys.to(dtype=torch.float16).keys.dtype == torch.float16
    with pytest.raises(TypeError, match=r"dtype must be float64, float32, bfloat16 or float16: got torch\.float8_e5m2"):
        keys.to(dtype=torch.float8_e5m2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_state_moved_to_another_dtype_is_one_for_it(dtype, state, gate):
    """As if it had been made for inputs of that dtype: a step takes it."""
    moved = state.to(dtype=dtype).to(dtype=torch.float32).to(dtype=dtype)
    steps({name: x.to(dtype) for name, x in NEW[gate].items()}, moved)
    assert moved.open_g.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_linear_state_for_decoding_is_never_narrow():
    """Every token is added to it: in bfloat16 it would stop at 256 times a token."""
    made = LinearState(torch.tensor([2]), torch.ones(1, 2, 4, 4).bfloat16())
    narrow = RecurrentMixerState(torch.zeros(1, 3, 8), made)
    ready = narrow.for_decoding(10)
    assert ready.memory.state.dtype == torch.float32
    assert ready.to(dtype=torch.bfloat16).memory.state.dtype == torch.float32
    assert ready.to(dtype=torch.bfloat16).conv.dtype == torch.bfloat16
    assert ready.to(dtype=torch.float64).memory.state.dtype == torch.float64
    mixer = LogLinearMamba2(8, 2, 4, 4, log_linear=False)
    with (
        pytest.raises(TypeError, match=r"state.memory.state must be float64 or float32: got torch\.bfloat16"),
        torch.no_grad(),
    ):
        mixer(torch.ones(1, 1, 8), RecurrentMixerState(torch.zeros(1, 3, 16), made, in_place=True))


NO_STATES = {
    "text": (lambda path: path.write_text("no tensors"), "not readable"),
    "nothing": (lambda path: path.write_bytes(b""), "not readable"),
    "half of it": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "not readable"),
    "a list": (lambda path: torch.save([1, 2], path), "of other content"),
    "weights": (lambda path: torch.save({"weight": torch.zeros(2)}, path), "of other content"),
}
DAMAGED = {  # by the fields that differ
    "a field less": (lambda x: {"open_g": None}, "of other content"),
    "a field more": (lambda x: {"more": torch.zeros(1)}, "of other content"),
    "a number": (lambda x: {"entries": 3}, "of other content"),
    "chunk size": (lambda x: {"chunk_size": 48}, "chunk_size must be a power"),
    "other chunks": (lambda x: {"chunk_size": 32}, r"open_k must have shape \["),
    "8 bits": (lambda x: {"entries": x["entries"].to(torch.float8_e5m2)}, "float32: got torch.float8_e5m2"),
    "low logs": (lambda x: {"open_g": x["open_g"].half()}, "open_g must be float32"),
    "fewer values": (lambda x: {"open_v": x["open_v"][:, :2]}, r"open_v must have shape \["),
    "strides": (lambda x: {"entries": x["entries"].mT.contiguous().mT}, "entries must be contiguous"),
    "a negative position": (lambda x: {"position": x["position"] - 1}, r"position must be in \[0, "),
    "a late position": (lambda x: {"position": x["position"] + 10**9}, r"position must be in \[0, "),
}


@pytest.mark.parametrize("case", [*NO_STATES, *DAMAGED])
def test_what_is_no_state_is_not_loaded(case, state, tmp_path):
    change, message = (NO_STATES | DAMAGED)[case]
    path = tmp_path / "state.pt"
    state.save(path)
    if case in NO_STATES:
        change(path)
    else:
        content = torch.load(path)
        content |= change(content)
        torch.save({name: value for name, value in content.items() if value is not None}, path)
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        DecodingState.load(path)
    assert str(path) in str(raised.value)


class Written(TorchDispatchMode):
    """Counts the bytes that operations write; views write nothing."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns):
            self.bytes += sum(x.nbytes for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result


def test_a_long_call_in_place_copies_the_state_at_most_once(gate, monkeypatch):
    """Around the op, which reads the buffers, and the delta rule's inverse, which is no copy: each number is written once.

    Of what exists twice the op gets a copy of the half that is live.
    """
    x = inputs(gate, B=2, T=4 * C + 9, H=2, G=1, K=32, V=32, dtype=torch.float32)
    state = prefilled(x, C + 7)
    x = tokens(x, C + 7, 4 * C + 9)
    want_o, want = full(x, state.to_state())
    given, before, solve = [], addresses(state), decoding_state._solve

    def op(call):
        given.append(call.state.entries.data_ptr())
        return want_o, want

    def inverse(*args):
        with _disable_current_modes():
            return solve(*args)

    monkeypatch.setattr(recurrence, "attend", op)
    monkeypatch.setattr(decoding_state, "_solve", inverse)
    scales = x.pop("level_scales")
    with torch.no_grad(), Written() as written:
        whole = RecurrentMixerState(torch.empty(2, 0, 0), state)
        o = recurrence._mix_in_place(x, scales, whole, None, None, False)
    assert o is want_o
    assert given == [state.entries.data_ptr()]
    assert addresses(state) == before
    halves = [x for x in (state.open_k, state.open_g, state.open_solve, state.decay) if x is not None]
    assert written.bytes < 1.01 * (state.nbytes + sum(x.nbytes for x in halves) / 2)
    assert_states_equal(state.to_state(), want, 1e-6)
