"""The JAX ops over eight simulated devices: outputs and gradients equal one device's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from calls import output
from jax.sharding import Mesh
from jax_calls import to_jax, to_torch

from loglinear.jax import forward
from loglinear.jax.mesh import attention_over_mesh, delta_rule_over_mesh, exchanged_bytes
from oracle import error, make_inputs

pytestmark = pytest.mark.default_packages


def over_mesh(x, **axes):
    function = delta_rule_over_mesh if "beta" in x else attention_over_mesh
    return function(**{"g": None, "level_scales": None, **x}, **axes)


@pytest.mark.parametrize(
    ("gate", "T", "shape", "axes"),
    [
        ("scalar", 512, (2, 1, 4), {"batch": "b", "context": "t"}),  # two blocks on each device
        ("diagonal", 512, (1, 1, 8), {"context": "t"}),
        ("diagonal delta", 512, (1, 2, 4), {"heads": "h", "context": "t"}),  # two blocks here too
    ],
)
def test_eight_devices_are_one(gate, T, shape, axes, monkeypatch):
    monkeypatch.setattr(forward, "BLOCK_CHUNKS", 1)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(shape), ("b", "h", "t"))
    x = make_inputs(gate=gate, B=2, T=T, H=4, G=1, K=3, V=2, L=12)
    x["g"][:, [0, 70, 300 % T]] = -torch.inf
    x = {name: t.requires_grad_() for name, t in x.items()}
    loss = jax.jit(jax.value_and_grad(lambda x: jnp.square(over_mesh(x, mesh=mesh, **axes)).sum()))
    have, grads = loss(to_jax(x))
    want = output(x).square().sum()  # the PyTorch side's, of one process
    assert abs(have - want.item()) <= 1e-12 * want.item()
    for name, wanted in zip(x, torch.autograd.grad(want, list(x.values()))):
        assert error(to_torch(grads[name]), wanted) <= 1e-11, name


def test_what_does_not_divide_is_refused():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("h", "t"))
    x = to_jax(make_inputs(gate="scalar", T=384))
    with pytest.raises(ValueError, match="q must hold a power of two of at least 64 tokens on each device: got 96"):
        over_mesh(x, mesh=mesh, context="t")
    with pytest.raises(ValueError, match=r"heads must be an axis of the mesh, \['h', 't'\]: got 'x'"):
        over_mesh(x, mesh=mesh, heads="x")
    with pytest.raises(ValueError, match="batch must divide 2 over the 4 devices of 't'"):
        over_mesh(x, mesh=mesh, batch="t")
    with pytest.raises(ValueError, match=r"q must have one head or a multiple of 4, .* got G=2"):
        over_mesh(x, mesh=mesh, heads="t")


def test_bytes_of_the_table_in_the_docs():
    assert exchanged_bytes(256, 48, 128, 64, False) == 255 * 48 * (128 * 64 + 1) * 4
    assert exchanged_bytes(256, 16, 128, 128, True) == 255 * 16 * 2 * 128 * 128 * 4
