"""Norms against torch's own rms_norm."""

import pytest
import torch
import torch.nn.functional as F

from loglinear.layers import GatedRMSNorm, RMSNorm


def test_rms_norm_equals_torch():
    torch.manual_seed(0)
    norm = RMSNorm(8, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), norm.weight, eps=1e-3), rtol=1e-6, atol=1e-6)


def test_statistics_are_float32_in_bfloat16():
    """A row of 255 ones and one 16: the mean of squares, 1.99, needs more than bfloat16's 8 bits of running sum."""
    x = torch.ones(1, 256, dtype=torch.bfloat16)
    x[0, 0] = 16
    norm = RMSNorm(256).bfloat16()
    want = F.rms_norm(x.double(), (256,), eps=1e-6)
    out = norm(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), want, rtol=2**-8, atol=0)


def test_the_gate_stands_before_or_after_the_norm():
    torch.manual_seed(0)
    x, gate = torch.randn(4, 6), torch.randn(4, 6)
    before, after = GatedRMSNorm(6, gate_first=True), GatedRMSNorm(6, gate_first=False)
    torch.testing.assert_close(before(x, gate), F.rms_norm(x * F.silu(gate), (6,), eps=1e-6))
    torch.testing.assert_close(after(x, gate), F.rms_norm(x, (6,), eps=1e-6) * F.silu(gate))


@pytest.mark.parametrize("kind", [RMSNorm, GatedRMSNorm])
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")])
def test_without_gradients_it_is_the_same_norm(kind, dtypes):
    """torch's own rms_norm then, with inputs and weights of one dtype or, under autocast, of two."""
    torch.manual_seed(0)
    x_dtype, weight_dtype = (getattr(torch, name) for name in dtypes)
    norm = kind(96).to(weight_dtype)
    torch.nn.init.normal_(norm.weight)
    inputs = [3 * torch.randn(20, 96).to(x_dtype) for _ in range(2 if kind is GatedRMSNorm else 1)]
    want = norm(*inputs)
    with torch.no_grad():
        out = norm(*inputs)
    assert out.dtype == want.dtype == x_dtype
    torch.testing.assert_close(out, want, rtol=torch.finfo(x_dtype).eps, atol=0)
