"""What the ops promise, of every transition and on every backend: plain PyTorch in float64, and the kernels in float32.

The kernels are asked on a GPU, or in Triton's interpreter where TRITON_INTERPRET=1 asks for it (minutes; CI asks for the linear
models and for states). Beside this suite: shapes and gates of the kernels in tests/kernels/on_device, states in
test_states.py, steps in test_step.py, refusals in test_bad_input.py.
"""

import os
from itertools import pairwise

import pytest
import torch
from calls import C, assert_close, both_forms, dense, fields, inputs, meaning, output, run, tokens
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

from loglinear.ops import attention as module
from loglinear.ops import checks, dispatch
from oracle import LOW_PRECISION_FACTOR, SAME_NUMBERS, TOLERANCES, error, gradients, linear_recurrence, plain_torch

CUDA, INTERPRETED = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
TRANSITIONS = ("identity", "scalar", "diagonal", "delta", "diagonal delta")
ORDER = ("q", "k", "v", "g", "beta", "level_scales")
transitions = pytest.mark.parametrize("gate", TRANSITIONS)
TWO_PARTS = 8e-3  # of a pass in 16 bits with a state between


class Backend:
    """Where a call runs, at which dtype and sizes, and how far it may be from float64 and from itself arranged otherwise."""

    def __init__(self, name: str) -> None:
        self.kernels = name == "triton"
        self.device = "cuda" if self.kernels and CUDA else "cpu"
        self.dtype = torch.float32 if self.kernels else torch.float64
        self.bar = TOLERANCES[self.dtype]
        self.again = 0.0 if self.kernels else SAME_NUMBERS
        self.ran: list = []

    def inputs(self, gate: str, dtype: torch.dtype | None = None, grad: bool = True, **sizes) -> dict:
        """Arguments by name."""
        small = {"K": 16, "V": 16, "H": 2, "G": 1} if self.kernels else {"K": 4, "V": 3, "H": 4, "G": 2}
        x = inputs(gate, **{"B": 2, **small, **sizes}, dtype=dtype or self.dtype)
        if INTERPRETED and (gate == "identity" or sizes.get("linear")):
            pytest.skip("the same kernels as with a scalar gate and λ")
        return {name: y.to(self.device).requires_grad_(grad) for name, y in x.items()}


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.gpu)])
def backend(request, monkeypatch):
    made = Backend(request.param)
    if made.kernels and not (CUDA or INTERPRETED):
        pytest.skip("needs a CUDA device or the interpreter")
    if not made.kernels and INTERPRETED:
        pytest.skip("runs without the interpreter")
    if made.kernels and not CUDA:
        takes = lambda x, backend="auto": backend != "torch" and x.q.dtype != torch.float64  # noqa: E731
        monkeypatch.setattr(dispatch, "attention", takes)
        monkeypatch.setattr(checks, "_known", {})
    kernels_of = module.kernels_of
    monkeypatch.setattr(module, "kernels_of", lambda transition: made.ran.append(transition) or kernels_of(transition))
    return made


def wide(x: dict) -> dict:
    return {name: y.detach().double().requires_grad_() for name, y in x.items()}


LENGTHS = (0, 1, C - 1, C, C + 1, 2 * C - 1, 2 * C, 2 * C + 1, 4 * C, 8 * C - 1, 8 * C, 8 * C + 1)


@transitions
@pytest.mark.parametrize("T", (40,) if INTERPRETED else LENGTHS)
def test_the_definition_at_every_length(backend, gate, T):
    if gate.startswith("diagonal") and T not in (0, 1, C, C + 1, 4 * C, 40):
        pytest.skip("seconds in the dense form, for bits that the other transitions share")
    x = backend.inputs(gate, T=T, L=11)
    y = wide(x)
    assert_close(x, output(x), dense(**y), backend.bar, y)
    assert bool(backend.ran) == backend.kernels


@transitions
@pytest.mark.parametrize(("H", "G"), [(6, 2)] if INTERPRETED else [(1, 1), (4, 2), (6, 1), (6, 2), (6, 3), (6, 6)])
def test_value_heads_share_query_heads_in_order(backend, gate, H, G):
    x = backend.inputs(gate, B=1, T=20 if INTERPRETED else C + 3, H=H, G=G)
    y = wide(x)
    assert_close(x, output(x, scale=-0.25), dense(**y | {"q": -0.25 * y["q"]}), backend.bar, y)


@transitions
def test_the_linear_model_is_lambda_one(backend, gate):
    """Without level_scales it is a recurrence; with λ = 1 the same numbers come through the tree."""
    small = {"T": 70, "B": 1, "H": 1} if INTERPRETED else {"T": 1000 if backend.kernels else 3 * C}
    x = backend.inputs(gate, **small, L=9)
    scales = torch.ones_like(x.pop("level_scales"))
    y = wide(x)
    want = linear_recurrence(**{name: t.cpu() for name, t in y.items()}).to(backend.device)
    assert_close(x, output(x), want, backend.bar, y)
    assert bool(backend.ran) == backend.kernels
    assert_close(x, output({**x, "level_scales": scales}), want, backend.bar, y)


@transitions
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16])
def test_low_precision_is_at_most_twice_plain_torch(backend, gate, dtype):
    """Against float64 on the same rounded inputs."""
    if dtype == torch.float16 and gate.startswith("diagonal") and not INTERPRETED:
        pytest.skip("the dtype is tested with the other transitions, and the transition with bfloat16")
    T = 40 if INTERPRETED else 1000 if backend.kernels else 2 * C + 22
    x = backend.inputs(gate, T=T, K=16, V=16, dtype=dtype)
    y, z = wide(x), {name: t.detach().clone().requires_grad_() for name, t in x.items()}
    got, want, rounded = output(x), dense(**y), plain_torch(**z)
    results = [[o, *gradients(o, leaves.values())] for o, leaves in ((got, x), (want, y), (rounded, z))]
    for name, have, exact, plain in zip(("o", *x), *results):
        assert have.dtype == dtype
        assert error(have, exact) <= LOW_PRECISION_FACTOR * error(plain, exact), name
    if INTERPRETED:
        return
    first, state = run(tokens(x, 0, C + 5))  # a state is float32, and each part rounds its outputs and its gradients
    second, state = run(tokens(x, C + 5, T), state)
    got = torch.cat([first, second], 1)
    assert error(meaning(state)[0], meaning(run(y)[1])[0]) <= TWO_PARTS
    for name, have, exact, plain in zip(("o", *x), [got, *gradients(got, x.values())], *results[1:]):
        assert error(have, exact) <= max(LOW_PRECISION_FACTOR * error(plain, exact), TWO_PARTS), name


def test_queries_and_keys_of_length_one(backend):
    x = backend.inputs("delta", T=40 if INTERPRETED else C + 9)
    x["k"] = (3 * x["k"].detach()).requires_grad_()
    y = wide(x)
    unit = {name: y[name] / torch.sqrt(y[name].square().sum(-1, keepdim=True) + 1e-6) for name in ("q", "k")}
    assert_close(x, output(x, use_qk_l2norm_in_kernel=True), dense(**y | unit), backend.bar, y)


@transitions
@both_forms
def test_packed_sequences_are_each_alone(backend, gate, linear):
    """Empty and one-token sequences among them: the same bits, and nothing leaks into another's gradients."""
    lengths = [0, 1, 18, 0, 20] if INTERPRETED else [0, 1, 5, C, C + 1, 0, 2 * C - 1, 1, 130, 0]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    x = backend.inputs(gate, B=1, T=sum(lengths), linear=linear)
    o = output(x, cu_seqlens=bounds.to(backend.device), cu_seqlens_cpu=bounds)
    grads = gradients(o, x.values())
    for left, right in pairwise(bounds.tolist()):
        y = {name: t.detach()[:, left:right].clone().requires_grad_() for name, t in x.items()}
        alone = output(y)
        assert torch.equal(o[:, left:right], alone)
        if right > left:
            last = left, right, y, alone
    left, right, y, alone = last
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(o)
    wanted = torch.autograd.grad(alone, list(y.values()), weights[:, left:right])
    assert all(torch.equal(g[:, left:right], w) for g, w in zip(grads, wanted, strict=True))
    inside = torch.autograd.grad(o[:, :1].sum(), list(x.values()), allow_unused=True, materialize_grads=True)
    assert all(g[:, 1:].eq(0).all() for g in inside)


@transitions
@both_forms
def test_two_parts_and_a_state_are_one_pass(backend, gate, linear):
    """Outputs, the state, and gradients across the state between."""
    cut, T = (66, 70) if INTERPRETED else (C + 30, 4 * C + 9)
    x = backend.inputs(gate, B=1, T=T, linear=linear, hard=False, **({"H": 1} if INTERPRETED else {}))
    y = wide(x)
    first, state = run(tokens(x, 0, cut))
    second, state = run(tokens(x, cut, T), state)
    want, expected = run(y)
    assert state.position.tolist() == [T]
    assert max(map(error, meaning(state), meaning(expected))) <= backend.bar
    assert_close(x, torch.cat([first, second], 1), want, backend.bar, y)


# (transition, linear, dynamic, packed): every pair of their values, in 10 of the 40 combinations.
SHAPES = ((False, False), (False, True), (True, False), (True, True), (False, False))
COMPILED = [
    (gate, linear, dynamic != linear, packed != linear)
    for gate, (dynamic, packed) in zip(TRANSITIONS, SHAPES)
    for linear in (False, True)
]


@pytest.mark.parametrize(("gate", "linear", "dynamic", "packed"), COMPILED)
def test_compiled_is_eager(backend, compiled, gate, linear, dynamic, packed):
    """One graph, forward and backward; with dynamic shapes, one graph for every length."""
    if INTERPRETED and (packed or dynamic):
        pytest.skip("minutes in the interpreter")
    function = compiled(lambda x, **kwargs: 2 * output(x, **kwargs), dynamic=dynamic)
    for i, T in enumerate((C + 7, 2 * C + 1, 5 * C) if dynamic else (20 if INTERPRETED else C + 7,)):
        x = backend.inputs(gate, B=1 if packed else 2, T=T, seed=T, linear=linear)
        bounds = torch.tensor([0, 5, 5, T])
        kwargs = {"cu_seqlens": bounds.to(backend.device), "cu_seqlens_cpu": bounds} if packed else {}
        # The delta rule's kernels keep more tensors for more tiers of the tree, which is another graph.
        again = dynamic and i and not (backend.kernels and gate.endswith("delta"))
        with torch.compiler.set_stance("fail_on_recompile" if again else "default"):
            o = function(x, **kwargs)
            have = gradients(o, x.values(), again=False)
        expected = 2 * output(x, **kwargs)
        assert error(o, expected) <= backend.again
        for name, *pair in zip(x, have, gradients(expected, x.values())):
            assert error(*pair) <= backend.again, name


@pytest.mark.skipif(INTERPRETED, reason="tests/kernels/on_device/test_compiled.py has it")
@pytest.mark.parametrize("gate", TRANSITIONS)
@pytest.mark.parametrize(
    ("packed", "missing"), [(False, "nothing"), (True, "nothing"), (False, "g"), (True, "level_scales")]
)
def test_opcheck(backend, gate, packed, missing):
    """Schema, fake implementation, autograd registration, and AOT dispatch with static and dynamic shapes."""
    if gate == "identity" or (missing == "g" and gate.startswith("diagonal")):
        pytest.skip("what another transition is without its g")
    if packed and (missing == "nothing") == (gate in ("diagonal", "delta")):
        pytest.skip("seconds, for what two other transitions have")
    x = backend.inputs(gate, B=1 if packed else 2, T=C + 3)
    args = [None if name == missing else x.get(name) for name in ORDER]
    bounds = torch.tensor([0, 9, C + 3], device=backend.device) if packed else None
    rest = bounds, None, 0.5, 0, "" if missing == "g" or backend.kernels else "maps", "auto"
    torch.library.opcheck(torch.ops.loglinear.attention.default, (*args, *rest))
    args = [None if value is None else value.detach() for value in args]
    backward = (torch.randn_like(x["v"]), *args, *rest, [])
    before = [value.clone() if isinstance(value, torch.Tensor) else value for value in backward]
    torch.library.opcheck(torch.ops.loglinear.attention_backward.default, backward)
    assert all(torch.equal(v, old) for v, old in zip(backward, before) if isinstance(v, torch.Tensor))


@transitions
@both_forms
def test_autocast_is_the_explicit_cast(backend, gate, linear):
    """q, k, v to 16 bits; gates and λ as they are; gradients in the dtype of the float32 arguments."""
    low = torch.float16 if INTERPRETED else torch.bfloat16
    x = backend.inputs(gate, T=20 if INTERPRETED else C + 9, dtype=torch.float32, linear=linear)
    cast = {name: t.to(low) if name in ("q", "k", "v") else t for name, t in x.items()}
    with torch.autocast(backend.device, low):
        o, state = run(x) if not backend.kernels else (output(x), None)
    expected, wanted = run(cast) if not backend.kernels else (output(cast), None)
    assert o.dtype == low
    assert torch.equal(o, expected)
    if state is not None:
        assert all(map(torch.equal, fields(state).values(), fields(wanted).values()))
    for name, *pair in zip(x, gradients(o, x.values()), gradients(expected, x.values())):
        assert pair[0].dtype == torch.float32
        assert torch.equal(*pair), name


@transitions
@both_forms
def test_checkpointing_and_a_graph_walked_twice(backend, gate, linear):
    x = backend.inputs(gate, T=20 if INTERPRETED else 2 * C + 9, linear=linear)
    names, expected = list(x), output(x)
    want = gradients(expected, x.values())
    assert all(map(torch.equal, gradients(expected, x.values()), want))
    if not backend.kernels:  # the state beside them is plain PyTorch, whose sums on a GPU have no order
        o, state = run(x)
        results = [o, *fields(state).values()]
        assert all(map(torch.equal, gradients(results, x.values()), gradients(results, x.values())))
    o = checkpoint(lambda *values: output(dict(zip(names, values))), *x.values(), use_reentrant=False)
    assert torch.equal(o, expected)
    assert all(map(torch.equal, gradients(o, x.values()), want))


@transitions
@both_forms
@pytest.mark.parametrize("dim", [0, 2])
def test_vmap_is_a_loop(backend, gate, linear, dim):
    """Outputs, and a gradient for each as of single samples, by ``torch.func``."""
    if INTERPRETED and dim:
        pytest.skip("minutes in the interpreter")
    T = 18 if INTERPRETED else C + 9
    each = [backend.inputs(gate, T=T, L=8, seed=seed, linear=linear, grad=False) for seed in range(3)]
    many = {name: torch.stack([x[name] for x in each], dim) for name in each[0]}

    def loss(x):
        return output(x).square().sum()

    got = vmap(output, in_dims=dim)(many)
    assert max(map(error, got, map(output, each))) <= backend.again
    got, want = vmap(grad(loss), in_dims=dim)(many), []
    for x in each:
        leaves = {name: y.clone().requires_grad_() for name, y in x.items()}
        want.append(torch.autograd.grad(loss(leaves), list(leaves.values())))
    for i, name in enumerate(many):
        assert max(map(error, got[name], [grads[i] for grads in want])) <= backend.again, name


@transitions
def test_a_backend_is_the_one_that_was_asked_for(backend, gate):
    x = backend.inputs(gate, T=18, grad=False)
    output(x, backend="torch")
    assert not backend.ran
    if backend.kernels:  # test_dispatch.py has the error where they cannot
        assert torch.equal(output(x, backend="triton"), output(x))
        assert len(backend.ran) == 2
