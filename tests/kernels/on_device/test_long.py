"""Long sequences and large tensors: where 32-bit offsets and sums over the whole past would show."""

from __future__ import annotations

import pytest
import torch
from cases import INTERPRETED, NAMES, make, relative, run

from loglinear.reference.chunkwise import chunkwise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")]
MILLION = 1 << 20


# Twice what rounding the operands costs plain torch in bfloat16: 0.3 to 0.5% in the output and all gradients.
BAR = 1e-2


def by_chunks(x: dict, do: torch.Tensor) -> list[torch.Tensor]:
    """(o, dq, dk, dv, dg, dλ) of the chunkwise reference in float64."""
    leaves = [y.double().requires_grad_() for y in x.values()]
    o, _ = chunkwise(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.double())]


@pytest.mark.parametrize("gate", ["usual", "zero"])
@pytest.mark.parametrize("T", [65_536, MILLION])
def test_up_to_a_million_tokens(device, T, gate):
    """Against the chunkwise form in float64: all tokens, the first and the last thousand."""
    x = make(device, T=T, H=1, K=32, V=32, L=21, dtype=torch.bfloat16, gate=gate)
    do = torch.randn_like(x["v"])
    for name, got, want in zip(NAMES, run(x, do), by_chunks(x, do)):
        for part in (slice(None), slice(0, 1000), slice(T - 1000, T)):
            error = relative(got[:, part], want[:, part])
            assert error <= BAR, f"{name}[{part}] has relative error {error:.2e} > {BAR:.2e}"


def test_more_than_two_to_the_31_elements(device):
    """The last head of a large tensor has the bits that it has alone."""
    if torch.cuda.get_device_properties(device).total_memory < 70e9:
        pytest.skip("needs 70 GB of memory")
    T, H, V = 600_000, 64, 64
    assert T * H * V > 2**31
    g = torch.Generator(device).manual_seed(3)

    def normal(*size, dtype=torch.bfloat16):
        return torch.randn(*size, generator=g, device=device, dtype=dtype)

    x = {"q": normal(1, T, 1, 16), "k": normal(1, T, 1, 16), "v": normal(1, T, H, V), "g": -0.1 * normal(1, T, H).abs()}
    x["level_scales"] = normal(1, T, H, 4)
    do = normal(1, T, H, V)
    together = run(x, do)
    last = {name: y if name in "qk" else y[:, :, -1:].contiguous() for name, y in x.items()}
    alone = run(last, do[:, :, -1:].contiguous())
    for name, a, b in zip(NAMES, together, alone):
        if name not in ("dq", "dk"):
            assert torch.equal(a[:, :, -1:], b), f"{name} of the last head differs"
