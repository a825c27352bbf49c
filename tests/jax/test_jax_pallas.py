"""The Pallas kernel: interpreted against the oracle, and lowered for a TPU that is not there."""

import jax
import jax.numpy as jnp
import pytest
import torch
from jax import export
from jax_calls import op, to_jax, with_gradients

from loglinear.jax.pallas import chunk_outputs
from loglinear.jax.products import numbers_of
from oracle import TOLERANCES, error, gradients, make_inputs, oracle

pytestmark = pytest.mark.default_packages


def test_the_kernel_is_the_definition():
    x = make_inputs(gate="scalar", B=1, T=150, H=2, G=1, K=8, V=8, L=5)
    x["g"][:, [0, 70]] = -torch.inf
    y = {name: t.clone().requires_grad_() for name, t in x.items()}
    want = oracle(**y)
    o, grads, _ = with_gradients({name: t.float() for name, t in x.items()}, backend="pallas")
    assert error(o, want) <= TOLERANCES[torch.float32]
    for name, wanted in zip(x, gradients(want, y.values())):
        assert error(grads[name], wanted) <= TOLERANCES[torch.float32], name


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_lowered_for_a_tpu(dtype):
    """Mosaic takes the kernel at the paper's widths."""
    p, g, r, n, C = 1, 1, 2, 2, 64
    shapes = [(p, g, n, C, 128), (p, g, n, C, 128), (p, g, r, n, C, 64)]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    arguments += [jax.ShapeDtypeStruct((p, g, r, n, C, *axes), jnp.float32) for axes in ((), (7,))]
    with jax.enable_x64(False):
        lowered = export.export(jax.jit(lambda *x: chunk_outputs(*x, numbers_of(dtype))), platforms=["tpu"])(*arguments)
    assert "tpu_custom_call" in lowered.mlir_module()


def test_what_it_does_not_take_is_refused():
    x = to_jax(make_inputs(gate="scalar", T=5))
    with pytest.raises(ValueError, match="backend must not be 'pallas' for float64 inputs"):
        op(x, backend="pallas")
    with pytest.raises(ValueError, match="backend must not be 'pallas' for the delta rule"):
        op(to_jax(make_inputs(gate="delta", T=5)), backend="pallas")
    with pytest.raises(ValueError, match="backend must be 'auto', 'xla', 'pallas' or 'torch': got 'triton'"):
        op(x, backend="triton")
