"""The JAX ops against the float64 oracle of the PyTorch side: outputs, gradients, packing, dtypes, transformations."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import pytest
import torch
from calls import C, dense
from jax_calls import op, to_jax, to_torch, tokens, with_gradients
from test_conformance import LENGTHS, TRANSITIONS

from loglinear.jax import log_linear_attention
from oracle import (
    LOW_PRECISION_FACTOR,
    TOLERANCES,
    error,
    gradients,
    linear_recurrence,
    make_inputs,
    oracle,
    plain_torch,
)

pytestmark = pytest.mark.default_packages
SMALL = {"B": 1, "H": 2, "G": 1, "K": 3, "V": 2}
GROUPED = {"H": 4, "G": 2, "L": 7}  # heads share q and k in order; fewer levels than the length needs


def with_resets(gate, *, T, **sizes):
    """Inputs with -inf and -1e30 among the gates, where there is one."""
    x = make_inputs(gate=gate, T=T, **{**SMALL, **sizes})
    if "g" in x:
        x["g"][:, [t for t in (0, 5, 63, 64, 65, 100, 130) if t < T]] = -torch.inf
        x["g"][:, 70:73] = -1e30
    return {name: y.requires_grad_() for name, y in x.items()}


def wide(x):
    return {name: y.detach().double().requires_grad_() for name, y in x.items()}


def assert_close(x, got, expected, bar, y=None):
    o, grads, _ = got
    assert error(o, expected) <= bar
    for name, want in zip(x, gradients(expected, (y or x).values()), strict=True):
        assert grads[name].isfinite().all(), name
        assert error(grads[name], want) <= bar, name


@pytest.mark.parametrize(("gate", "T"), [("scalar", 300), ("diagonal delta", 150)])
def test_the_definition(gate, T):
    x = with_resets(gate, T=T, **GROUPED)
    assert_close(x, with_gradients(x, scale=-0.5), -0.5 * oracle(**x), TOLERANCES[torch.float64])


@pytest.mark.parametrize("gate", TRANSITIONS)
def test_every_transition_at_every_length(gate):
    """The cases of tests/ops/test_conformance.py as packed sequences, in two orders: one compilation serves all offsets."""
    lengths = [T for T in LENGTHS if not gate.startswith("diagonal") or T in (0, 1, C, C + 1, 4 * C)]
    x = with_resets(gate, T=sum(lengths), L=11)
    for order in (lengths, lengths[::-1]):
        bounds = torch.tensor([0, *order]).cumsum(0)
        parts = [dense(**tokens(x, *pair)) for pair in pairwise(bounds)]
        got = with_gradients(x, {"cu_seqlens": to_jax(bounds)})
        assert_close(x, got, torch.cat(parts, 1), TOLERANCES[torch.float64])


def test_segment_ids_are_offsets():
    """One compilation for all ids. Where there are more segments than it has room for, all is NaN."""
    x = with_resets("scalar", T=150, B=2)
    call = jax.jit(lambda x, ids: op(x, segment_ids=ids, max_segments=3)[0])
    ids = jnp.asarray([[4] * 70 + [2] * 80, [1] * 150])
    cut, rows = [tokens(x, 0, 70), tokens(x, 70, 150)], [slice(0, 1), slice(1, 2)]
    first = torch.cat([dense(**{name: y[rows[0]] for name, y in part.items()}) for part in cut], 1)
    want = torch.cat([first, dense(**{name: y[rows[1]] for name, y in x.items()})])
    assert error(to_torch(call(to_jax(x), ids)), want) <= TOLERANCES[torch.float64]
    assert jnp.isnan(call(to_jax(x), ids.at[1, 20:].set(7))).all()


def test_the_linear_model_is_lambda_one():
    x = with_resets("delta", T=150)
    del x["level_scales"]
    assert_close(x, with_gradients(x), linear_recurrence(**x), TOLERANCES[torch.float64])


@pytest.mark.parametrize(("gate", "dtype"), [("scalar", torch.bfloat16), ("delta", torch.float32)])
def test_other_dtypes(gate, dtype):
    """float32 to 1e-5; bfloat16 at most twice plain PyTorch's error, against float64 on the same rounded inputs."""
    x = make_inputs(gate=gate, T=150, **{**SMALL, "K": 16, "V": 16}, dtype=dtype, grad=True)
    y, z = wide(x), {name: t.detach().clone().requires_grad_() for name, t in x.items()}
    o, grads, kind = with_gradients(x)
    assert kind == {torch.bfloat16: jnp.bfloat16, torch.float32: jnp.float32}[dtype]
    exact, plain = oracle(**y), plain_torch(**z)
    results = [o, *grads.values()], [exact, *gradients(exact, y.values())], [plain, *gradients(plain, z.values())]
    for name, have, want, rounded in zip(("o", *x), *results):
        bar = TOLERANCES[dtype] if dtype in TOLERANCES else LOW_PRECISION_FACTOR * error(rounded, want)
        assert error(have, want) <= bar, name


def test_a_bad_token_spoils_what_comes_after_it_alone():
    x = with_resets("scalar", T=300, **GROUPED)  # a compilation of test_the_definition
    bad = {name: y.detach().clone() for name, y in x.items()}
    bad["v"][0, 90, 0] = torch.nan
    o, grads, _ = with_gradients(bad, scale=-0.5)
    want, _, _ = with_gradients(x, scale=-0.5)
    assert o[:, 90:, 0].isnan().all()
    assert torch.equal(o[:, :90], want[:, :90])
    assert torch.equal(o[:, :, 1:], want[:, :, 1:])
    assert all(y.isfinite().all() for y in grads.values())


def test_vmap_and_checkpoint_change_nothing():
    each = [
        {k: y.requires_grad_() for k, y in make_inputs(gate="delta", T=70, seed=i, **SMALL).items()} for i in (0, 1)
    ]
    many = jax.tree.map(lambda *y: jnp.stack(y, 1), *map(to_jax, each))
    loss = lambda x: jnp.square(jax.checkpoint(lambda x: op(x)[0])(x)).sum()  # noqa: E731
    got = jax.jit(jax.vmap(jax.grad(loss), in_axes=1, out_axes=1))(many)
    for i, x in enumerate(each):
        for name, want in zip(x, torch.autograd.grad(oracle(**x).square().sum(), list(x.values())), strict=True):
            assert error(to_torch(got[name][:, i]), want) <= TOLERANCES[torch.float64], name


def shapes(T):
    float32 = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)  # noqa: E731
    return {
        "q": float32(1, T, 1, 16),
        "k": float32(1, T, 1, 16),
        "v": float32(1, T, 2, 16),
        "g": float32(1, T, 2),
        "level_scales": float32(1, T, 2, 18),
    }


def test_the_program_is_the_same_for_every_length_and_its_memory_is_lean():
    """Blocks and levels of the tree are loops. The derivative keeps what grows as the arguments do."""
    loss = jax.jit(jax.grad(lambda x: log_linear_attention(**x)[0].sum()))
    short, long = (loss.lower(shapes(T)) for T in (1 << 14, 1 << 17))
    assert len(long.as_text().splitlines()) == len(short.as_text().splitlines())
    temporary = short.compile().memory_analysis().temp_size_in_bytes
    arguments = sum(4 * y.size for y in shapes(1 << 14).values())
    assert temporary < 4 * arguments  # measured 2.3 (jaxlib 0.10.2); every level's states would be 20
