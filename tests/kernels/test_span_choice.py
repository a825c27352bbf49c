"""Which calls the span kernels take, and why the portable ones take the others. Nothing runs here."""

import pytest
import torch
import triton

from loglinear.kernels.decay.span import choice
from loglinear.kernels.tree.bundles import gather
from loglinear.kernels.tree.problem import describe
from loglinear.kernels.tuning import scalar_gate_config

pytestmark = pytest.mark.default_packages


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        ("3.4.0", (9, 0), "Triton 3.4.0, where (3, 6) to below (3, 7) is tested"),
        ("3.6.0", (9, 0), None),
        ("3.7.1", (9, 0), "Triton 3.7.1, where"),
        ("3.10.0", (9, 0), "Triton 3.10.0, where"),
        ("3.6.0", (8, 0), "compute capability (8, 0), where the span kernels need (9, 0)"),
        ("3.6.0", (10, 0), "compute capability (10, 0)"),
    ],
)
def test_gpus_and_versions(monkeypatch, version, capability, reason):
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    choice.why_not_here.cache_clear()
    found = choice.why_not_here(torch.device("cuda", 0))
    choice.why_not_here.cache_clear()
    assert found is None if reason is None else reason in found


def refusals(T=700, H=8, G=1, K=128, V=64, dtype=torch.bfloat16, L=11, reach=0, pad=0):
    """(why not the forward pass, why not the backward pass) on such a GPU."""
    q, v = (torch.empty(2, T, heads * width + pad, device="meta", dtype=dtype) for heads, width in ((G, K), (H, V)))
    q, v = q[..., : G * K].unflatten(-1, (G, K)), v[..., : H * V].unflatten(-1, (H, V))
    g, scales = (torch.empty(2, T, H, *more, device="meta") for more in ((), (L,)))
    problem = describe(q, v, scales, (), scalar_gate_config(dtype, K, V), reach)
    x = gather(q, q, v, g, None, scales, v, 1.0)
    return choice.why_not(problem, x, reach), choice.why_not_backward(problem, x, reach)


@pytest.mark.parametrize(
    ("sizes", "forward", "backward"),
    [
        ({}, None, None),
        ({"T": 1}, None, None),
        ({"T": 0}, "no tokens", "no tokens"),
        ({"K": 64}, None, "not bfloat16, K=128 and V=64"),
        ({"V": 128}, None, "not bfloat16, K=128 and V=64"),
        ({"dtype": torch.float16}, None, "not bfloat16"),
        ({"dtype": torch.float32}, "torch.float32, where the span kernels take 16 bits", "not bfloat16"),
        ({"K": 32}, "K=32, V=64, where", "not bfloat16, K=128"),
        ({"V": 96}, "K=128, V=96, where", "not bfloat16, K=128"),
        ({"H": 3}, "3 heads a group, where span kernels share the scores of 4 or more", "3 heads a group"),
        ({"L": 7}, None, "7 levels, not 8 to 32"),
        ({"reach": 1000}, "go on from earlier tokens", "go on from earlier tokens"),
        ({"pad": 4}, "q whose tokens do not begin at multiples of 16 bytes", "q whose tokens do not begin"),
        ({"pad": 8}, None, None),
    ],
)
def test_sizes(monkeypatch, sizes, forward, backward):
    monkeypatch.setattr(choice, "why_not_here", lambda device: None)
    for found, reason in zip(refusals(**sizes), (forward, backward)):
        assert found is None if reason is None else reason in found
