"""The state that prefill computes beside the kernels, against the chunkwise form's own."""

import pytest
import torch

from loglinear.ops import segments
from loglinear.ops.inputs import Call, Inputs
from loglinear.reference.chunkwise import chunkwise

FIELDS = ("entries", "decay", "open_k", "open_v", "open_g")


def make(batch, length, heads=4, groups=2, resets=False):
    shapes = ((batch, length, groups, 5), (batch, length, groups, 5), (batch, length, heads, 3), (batch, length, heads))
    q, k, v, g = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    g = -0.1 * g.abs()
    if resets:
        g[:, 40::97] = float("-inf")
    return [x.requires_grad_() for x in (q, k, v, g)]


def final_state(k, v, g, lengths, packed):
    """Beside an o that is known: any numbers."""
    scales = torch.ones(*v.shape[:3], 9, dtype=v.dtype)
    bounds = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    o, state = segments.attend(Call(Inputs(k, k, v, g, None, scales), 1.0, None, True, bounds), lengths, v)
    assert o is v or torch.equal(o, v)
    return state


def reference(q, k, v, g, lengths):
    scales = torch.ones(*v.shape[:3], 9, dtype=v.dtype)
    return chunkwise(q, k, v, g, scales, lengths=lengths)[1]


def compare(got, want, inputs):
    assert torch.equal(got.position, want.position)
    for name in FIELDS:
        a, b = getattr(got, name), getattr(want, name)
        live = torch.ones_like(b, dtype=torch.bool) if name != "decay" else b.isfinite()
        torch.testing.assert_close(
            a[live], b[live], rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )
    seeds = [torch.randn_like(getattr(want, name)) for name in FIELDS]
    grads = []
    for state in (got, want):
        loss = sum((getattr(state, name) * seed).nan_to_num(0, 0, 0).sum() for name, seed in zip(FIELDS, seeds))
        grads.append(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))
    for a, b in zip(*grads):
        torch.testing.assert_close(a.nan_to_num(0), b.nan_to_num(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 127, 128, 192, 449, 1000])
def test_rows(length, per_channel):
    q, k, v, g = make(2, length)
    if per_channel:
        g = (g.detach().unsqueeze(3) * torch.rand(5, dtype=g.dtype)).requires_grad_()
    compare(final_state(k, v, g, (length,) * 2, packed=False), reference(q, k, v, g, (length,) * 2), (k, v, g))


def test_packed_sequences():
    lengths = (0, 70, 1, 300, 64, 0)
    q, k, v, g = make(1, sum(lengths))
    compare(final_state(k, v, g, lengths, packed=True), reference(q, k, v, g, lengths), (k, v, g))


def test_no_sequence():
    q, k, v, g = make(1, 0)
    compare(final_state(k, v, g, (), packed=True), reference(q, k, v, g, ()), (k, v, g))


def test_resets():
    q, k, v, g = (x.detach().requires_grad_() for x in make(1, 450, resets=True))
    got, want = final_state(k, v, g, (450,), packed=False), reference(q, k, v, g, (450,))
    for name in ("entries", "open_k", "open_v", "open_g"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got.decay.exp(), want.decay.exp(), rtol=1e-11, atol=1e-11)
    got.entries.sum().backward()
    assert all(x.grad.isfinite().all() for x in (k, v, g))


def test_no_gate():
    q, k, v, g = make(1, 200)
    want = reference(q, k, v, torch.zeros_like(g), (200,))
    got = final_state(k, v, None, (200,), packed=False)
    torch.testing.assert_close(got.entries, want.entries, rtol=1e-11, atol=1e-11)
    assert torch.equal(got.decay, want.decay)
