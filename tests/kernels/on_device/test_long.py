"""Long sequences and large tensors: where 32-bit offsets and sums over the whole past would show."""

from __future__ import annotations

import pytest
import torch
from cases import DECAY, DELTA, exact, forward, make, names_of, reference, relative, run, wide

pytestmark = pytest.mark.gpu
MILLION = 1 << 20

# Twice what rounding the operands costs plain torch in bfloat16: 0.3 to 0.5% in the output and all gradients, of the delta
# rule too (0.35 to 0.52% with K = V = 64, at 256 to 2048 tokens alike).
BAR = 1e-2
# A delta rule that forgets slowly: maps near the identity are rounded at every level of the tree. Plain torch with maps
# rounded to bfloat16 after each product has 0.9% at 4096 tokens and 1.8% at 65,536 (K = V = 64, C = 64, without a gate, β
# up to 1/32); twice that. More than twice plain torch without a tree, which has 0.4%.
SLOW_BAR = 4e-2


def check_parts(name: str, got: torch.Tensor, want: torch.Tensor, bar: float) -> None:
    """All tokens, the first and the last thousand."""
    assert got.isfinite().all(), f"{name} is not finite"
    for part in (slice(None), slice(0, 1000), slice(got.shape[1] - 1000, None)):
        error = relative(got[:, part], want[:, part])
        assert error <= bar, f"{name}[{part}] has relative error {error:.2e} > {bar:.2e}"


@pytest.mark.parametrize("gate", ["usual", "zero"])
@pytest.mark.parametrize("T", [16_384, 65_536, MILLION])
def test_up_to_a_million_tokens(device, T, gate):
    """Against the chunkwise form in float64: all tokens, the first and the last thousand."""
    x = make(device, DECAY, T=T, H=1, K=32, V=32, L=21, dtype=torch.bfloat16, gate=gate)
    do = torch.randn_like(x["v"])
    for name, got, want in zip(names_of(x), run(x, do), exact(x, do)):
        check_parts(name, got, want, BAR)


@pytest.mark.parametrize(("gate", "strength", "bar"), [("usual", 1, BAR), ("zero", 1 / 64, SLOW_BAR)])
@pytest.mark.parametrize("width", [64, 128])
def test_delta_rule_of_a_quarter_of_a_million_tokens(device, width, gate, strength, bar):
    """The output against the chunkwise form in float64; the tree has 12 levels over its chunks."""
    x = make(device, DELTA, T=MILLION // 4, H=2, K=width, V=width, L=19, dtype=torch.bfloat16, gate=gate)
    x["beta"] *= strength
    with torch.no_grad():
        want = reference(**wide(x))
        check_parts("o", forward(x), want, bar)


@pytest.mark.parametrize("width", [64, 128])
def test_gradients_of_a_long_delta_rule(device, width):
    """Output and all six gradients against the chunkwise form in float64."""
    x = make(device, DELTA, T=MILLION // 16, H=2, K=width, V=width, L=17, dtype=torch.bfloat16)
    do = torch.randn_like(x["v"])
    for name, got, want in zip(names_of(x), run(x, do), exact(x, do), strict=True):
        check_parts(name, got, want, BAR)


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
    for name, a, b in zip(names_of(x), together, alone):
        if name not in ("dq", "dk"):
            assert torch.equal(a[:, :, -1:], b), f"{name} of the last head differs"
