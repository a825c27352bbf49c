"""Steps of every transition against one pass in float64, and to the bit where only a row's neighbours or what is dead differ.

Plain PyTorch steps in float64. The kernels step in float32, on a GPU, or in Triton's interpreter where TRITON_INTERPRET=1 asks
for it. Wrong calls are in test_step.py, what serving does with a state in test_decoding_state.py.
"""

import dataclasses
import os

import pytest
import torch
from calls import chunked, inputs, rows, tokens
from test_step import assert_states_equal, poisoned, step, steps

from guarded import guarded_memory
from loglinear import DecodingState
from loglinear.kernels import decoding
from loglinear.ops import dispatch
from oracle import LOW_PRECISION_FACTOR, TOLERANCES, error, fused, plain_torch, spoilt

CUDA, INTERPRETED = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
C = 16 if INTERPRETED else 64
# Tokens before the steps: nothing, chunks about to close with 0, 1 and 3 merges, and chunks that have just opened.
PREFILLS = (0, C - 1, 2 * C - 1, 3 * C, 8 * C - 2) if INTERPRETED else (0, 1, 5, 63, 64, 65, 127, 128, 200, 1000)
PREFILLS += (4096, 4097) if CUDA else ()
STEPS = 3 if INTERPRETED else 80
GATES = ("scalar", "delta", "diagonal", "diagonal delta")
all_gates = pytest.mark.parametrize("gate", GATES)
# A gate per channel without the delta rule runs a part of what both together run.
gates = pytest.mark.parametrize("gate", [gate for gate in GATES if not INTERPRETED or gate != "diagonal"])


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.gpu)])
def kernels(request, monkeypatch):
    """Whether the kernels run the steps; their scratch is full of NaN, inside guard bands."""
    if request.param == "torch":
        if INTERPRETED:
            pytest.skip("runs without the interpreter")
        yield False
        return
    if not (CUDA or INTERPRETED):
        pytest.skip("needs a CUDA device or the interpreter")
    monkeypatch.setattr(dispatch, "step", lambda *given: True)
    with guarded_memory(monkeypatch):
        yield True


@pytest.fixture
def make(kernels):
    """``make(gate, **sizes)``: inputs of one row; λ has either sign."""

    def made(gate, **sizes):
        small = {"B": 1, "H": 1 if INTERPRETED else 4, "G": 1, "K": 16, "V": 16, "L": 12}
        x = inputs(gate, **small | {"dtype": torch.float32 if kernels else torch.float64} | sizes)
        return {name: y.to("cuda" if kernels and CUDA else "cpu") for name, y in x.items()}

    return made


def full(x, scale=1.0):
    """o in float64 and the state after the last token, by the chunkwise form."""
    return chunked({name: y.double() for name, y in x.items()}, scale=scale, chunk_size=C)


def start(x, length=0, entry_dtype=torch.float32, max_context=512 * C):
    """The decoding state after the first tokens of x."""
    before = full(tokens(x, 0, length))[1]
    return DecodingState.from_state(before, max_context, entry_dtype, dtype=x["v"].dtype)


def check(x, length, sizes=(1,), bar=None, scale=0.7, entry_dtype=torch.float32):
    """The tokens after ``length``, and the state after them, against one pass."""
    bar = TOLERANCES[x["v"].dtype] if bar is None else bar
    want, final = full(x, scale)
    state = start(x, length, entry_dtype)
    got = steps(tokens(x, length, x["v"].shape[1]), state, sizes, scale=scale)
    assert got.isfinite().all()
    assert got.dtype == x["v"].dtype
    assert error(got, want[:, length:]) <= bar
    assert_states_equal(state.to_state(), final, bar)


@all_gates
@pytest.mark.parametrize("length", PREFILLS)
def test_prefill_then_steps_is_one_pass(make, gate, length):
    check(make(gate, T=length + STEPS), length)


@gates
def test_several_tokens_a_call(make, gate):
    """A call that closes a chunk with its first token, its last, or one between, and goes on in the next."""
    check(make(gate, T=4 * C + 5), 3 * C - 1, (1, 2, C, 3))


@pytest.mark.gpu
@gates
def test_nothing_has_drifted_after_300_000_tokens(make, kernels, gate):
    """A chunk a call, from a prefill of 1,000 tokens on; the scalar gate forgets over a hundred thousand tokens."""
    if not (kernels and CUDA):
        pytest.skip("needs a CUDA device")
    x = make(gate, T=301_000, H=1, L=20)
    if "beta" not in x:
        x["g"] *= 1e-4
    want, final = full(x)
    state = start(x, 1000, max_context=301_000)
    got = steps(tokens(x, 1000, 301_000), state, (C,))
    for part in (slice(None), slice(-1000, None)):
        assert error(got[:, part], want[:, 1000:][:, part]) <= TOLERANCES[torch.float32]
    assert_states_equal(state.to_state(), final, TOLERANCES[torch.float32])


@gates
def test_a_row_does_not_see_its_batch(make, gate):
    """Rows at different positions, one of which closes its chunk while another opens one."""
    lengths = (2, C - 2, 4 * C - 1)
    x = make(gate, B=3, T=4 * C + 6)
    alone = [start(rows(x, [b]), length) for b, length in enumerate(lengths)]
    together = DecodingState.stack(alone)
    new = make(gate, B=3, T=3, seed=1)
    got = steps(new, together, (1, 2))
    for b, state in enumerate(alone):
        assert torch.equal(got[b : b + 1], steps(rows(new, [b]), state, (1, 2)))
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


def same(one, other):
    """Bit for bit, but on a GPU, where other distances of rows are another kernel."""
    return torch.equal(one, other) or (CUDA and error(one, other) < TOLERANCES[torch.float32])


@all_gates
def test_rows_of_a_state_by_index(make, gate):
    """Pages in another order than the rows, and more of them: the same results, and no byte of another page is touched."""
    lengths = (2, C - 2, 4 * C - 1)
    x = make(gate, B=3, T=4 * C + 6, H=2)
    state = DecodingState.stack([start(rows(x, [b]), length) for b, length in enumerate(lengths)])
    index = torch.tensor([3, 0, 4], device=state.device)
    held, memory = paged(dataclasses.replace(state, position=state.position.int()), index, 6)  # int32 as in pages
    for first, last in ((0, 1), (1, 3)):
        new = tokens(x, first, last)
        assert same(step(new, held, scale=0.7, state_indices=index), step(new, state, scale=0.7))
    for ours, theirs in zip(held.reorder(index).to_state()._tensors(), state.to_state()._tensors()):
        assert same(ours, theirs)
    assert (memory[[1, 2, 5]] == -1).all()


@gates
@pytest.mark.parametrize("groups", [2] if INTERPRETED else [1, 2, 4])
def test_groups(make, gate, groups):
    check(make(gate, T=C + 1, H=4, G=groups), C - 1, (2,))


WIDTHS = [(24, 40)] if INTERPRETED else [(16, 16), (96, 96), (128, 64), (192, 384), (256, 256), (1, 1)]


@gates
@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_widths(make, gate, K, V):
    """Several programs share a head, and a call goes on after closing the chunk: the interpreter runs the first of them to
    its end before the next begins, so one that read what another writes would be wrong."""
    check(make(gate, T=4 * C + 1, K=K, V=V, H=1), 4 * C - 1, (2,))


@all_gates
@pytest.mark.parametrize("what", ["none", "strong", "very negative", "reset"])
def test_gates(make, gate, what):
    """Those of a head, or those of some channels."""
    if what == "none" and gate.startswith("diagonal"):
        pytest.skip("without a gate it is the scalar gate")
    if what == "strong" and INTERPRETED:
        pytest.skip("between the others")
    x = make(gate, T=4 * C + 4)
    few = torch.rand(x["g"].shape, generator=torch.Generator().manual_seed(11)).to(x["g"].device) < 0.1
    x["g"][few] *= {"none": 0.0, "strong": 1e3, "very negative": 1e5, "reset": torch.inf}[what]
    if what == "none":
        del x["g"]
    check(x, 4 * C - 5, (9,))


@gates
def test_a_reset_forgets_exactly(make, gate):
    x = make(gate, T=2 * C + 4)
    x["g"][:, 2 * C - 2] = float("-inf")
    other = x | {"v": x["v"].clone()}
    other["v"][:, : 2 * C - 2] *= 1000
    outputs = [steps(tokens(y, 2 * C - 3, 2 * C + 4), start(y, 2 * C - 3), (7,)) for y in (x, other)]
    assert torch.equal(outputs[0][:, 1:], outputs[1][:, 1:])
    assert not torch.equal(outputs[0][:, :1], outputs[1][:, :1])


@gates
@pytest.mark.parametrize("L", [1, 6] if INTERPRETED else [1, 3, 6])
def test_levels_past_the_last_share_it(make, gate, L):
    check(make(gate, T=7 * C + 4, L=L), 7 * C + 2)


@gates
@pytest.mark.parametrize("low_entries", [False, True])
def test_low_precision_is_within_twice_of_plain_torch(make, kernels, gate, low_entries):
    if low_entries and INTERPRETED:
        pytest.skip("entries of 16 bits are bfloat16, which the interpreter does not have")
    T = (
        C + 21 if gate.startswith("diagonal") and not kernels else 6 * C + 1
    )  # plain PyTorch, the bar, takes T·T·K numbers
    low = torch.float16 if INTERPRETED else torch.bfloat16
    x = {n: y.to(low) if n in "qkv" else y.float() for n, y in make(gate, T=T, dtype=torch.float64).items()}
    length = T - 4 if INTERPRETED else 0
    bar = LOW_PRECISION_FACTOR * error(plain_torch(**x, scale=0.7)[:, length:], full(x, 0.7)[0][:, length:])
    check(x, length, bar=bar, entry_dtype=torch.bfloat16 if low_entries else torch.float32)


@gates
@pytest.mark.parametrize("length", [5 * C + C - 2] if INTERPRETED else [0, 5, C, 200, 7 * C])
def test_what_is_dead_is_never_read(make, gate, length):
    x = make(gate, T=length + 4 if INTERPRETED else length + C + 6)
    clean = start(x, length, max_context=16 * C)
    dirty, new = poisoned(clean.clone()), tokens(x, length, x["v"].shape[1])
    assert torch.equal(steps(new, dirty, (1, 3)), steps(new, clean, (1, 3)))
    for ours, theirs in zip(dirty.to_state()._tensors(), clean.to_state()._tensors()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("gate", ["delta", "diagonal delta"])
def test_unit_length_of_queries_and_keys(make, gate):
    x = make(gate, T=C + 3, K=24)
    x["k"] *= 3.0
    unit = {name: x[name] * torch.rsqrt(x[name].square().sum(-1, keepdim=True) + 1e-6) for name in ("q", "k")}
    state, bar = start(x | unit, C - 3), TOLERANCES[x["v"].dtype]
    got = steps(tokens(x, C - 3, C + 3), state, (2, 4), use_qk_l2norm_in_kernel=True)
    assert error(got, full(x | unit)[0][:, C - 3 :]) < bar
    assert error(state.to_state().open_k, full(x | unit)[1].open_k) < bar


@pytest.mark.parametrize("gate", ["scalar", "delta"] if INTERPRETED else GATES)
def test_a_token_that_is_not_finite(make, gate):
    """It changes no bit before it, of another row or of another head, and is not forgotten."""
    x = make(gate, B=2, H=2, T=C + 5)

    def run(x):
        """A call over the end of a chunk, and one in the next."""
        before = full(tokens(x, 0, C - 2))[0].to(x["v"].dtype)
        return torch.cat([before, steps(tokens(x, C - 2, C + 5), start(x, C - 2), (5, 2))], 1)

    clean = run(x)
    for name, s in (("k", C - 1), ("v", C + 1), ("g", C - 1), ("beta", C), ("v", 3)):
        if name not in x:
            continue
        o = run(spoilt(x, name, torch.nan, s, 0 if name == "k" else 1, 3))
        assert torch.equal(o[:, :s], clean[:, :s]), (name, s)
        assert torch.equal(o[1:], clean[1:]), (name, s)
        assert name == "k" or torch.equal(o[:, :, 0], clean[:, :, 0]), (name, s)
        assert not o[0, s:, 1, slice(3, 4) if name == "v" else slice(None)].isfinite().any(), (name, s)


@gates
def test_strided_inputs(make, gate):
    """Slices of a fused projection are read where they lie, in other vectors on a GPU; transposed ones are copied."""
    x = make(gate, B=2, T=2)
    transposed = {name: y.transpose(1, 2).contiguous().transpose(1, 2) for name, y in x.items()}
    expected = step(x, start(x))
    assert error(step(transposed, start(x)), expected) == 0.0
    assert same(step(fused(x), start(x)), expected)


@gates
def test_nothing_to_do(make, gate):
    x = make(gate, B=0, T=1)
    assert step(x, start(x)).shape == x["v"].shape


# ---------------------------------------------------------------------------------------------------- the kernels alone


@all_gates
def test_a_row_may_go_on_with_either(make, kernels, gate, monkeypatch):
    """Both forms hold one state."""
    if not kernels:
        pytest.skip("compares the kernels with the plain form")
    x = make(gate, T=C + 4)
    first, second = start(x, C - 2), start(x, C - 2)
    new = tokens(x, C - 2, C + 4)
    got = steps(new, first, (3,))
    monkeypatch.setattr(dispatch, "step", lambda *given: False)
    assert error(got, step(new, second)) < TOLERANCES[torch.float32]
    assert_states_equal(first.to_state(), second.to_state(), TOLERANCES[torch.float32])


@gates
def test_nothing_is_written_past_the_slots(make, kernels, gate):
    """A row beyond max_context is the caller's mistake; its neighbours' entries stay whole."""
    if not kernels:
        pytest.skip("an error on the CPU")
    x = make(gate, T=2 * C, H=2)
    state = start(x, 2 * C - 1, max_context=2 * C - 1)
    assert state.entries.shape[2] == 1
    before = state.entries.clone()
    decoding.step(**{"g": None, **tokens(x, 2 * C - 1, 2 * C)}, state=state)
    assert torch.equal(state.entries, before)


@pytest.mark.gpu
@gates
def test_replayed_by_a_graph(make, kernels, gate):
    """One captured step serves every position, closings included; ``restore_`` takes it back."""
    if not (kernels and CUDA):
        pytest.skip("needs a CUDA device")
    T = 2 * C + 5
    x = make(gate, B=2, T=T, K=128, V=64, dtype=torch.bfloat16)
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
