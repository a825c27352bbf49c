"""The span kernels of the scalar gate on a Hopper GPU: against float64, and with the same bits in a longer or a packed call."""

from __future__ import annotations

from itertools import pairwise

import cases
import pytest
import torch
from cases import DECAY

from loglinear.kernels import decay
from loglinear.kernels.decay.span import choice
from loglinear.kernels.tree import launching

KERNELS = {"span_output_kernel", "span_local_grads_kernel", "span_query_grads_kernel", "span_key_grads_kernel"}


@pytest.fixture(autouse=True)
def spans(monkeypatch):
    """The span kernels take what they can, and what they take is listed."""
    launching.plans_of.cache_clear()
    if (reason := choice.why_not_here(torch.device("cuda" if torch.cuda.is_available() else "cpu"))) is not None:
        pytest.skip(reason)
    launched, launch = [], launching.launch

    def spy(kernel, *arguments, **constants):
        launched.append(kernel.fn.__name__)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(launching, "launch", spy)
    yield launched
    launching.plans_of.cache_clear()


@pytest.mark.parametrize("T", [1, 63, 65, 127, 129, 255, 257, 1000, 2049])
def test_any_number_of_tokens(device, spans, T):
    cases.check(device, DECAY, B=2, T=T, H=4, K=128, V=64, dtype=torch.bfloat16, gate="reset")
    assert set(spans) >= KERNELS


@pytest.mark.parametrize("L", [1, 6, 8, 9])
def test_fewer_levels_than_the_tree_has(device, L):
    cases.check(device, DECAY, T=1100, H=4, K=128, V=64, L=L, dtype=torch.bfloat16)


@pytest.mark.parametrize(("G", "K", "V", "dtype"), [(2, 64, 128, torch.float16), (1, 128, 192, torch.bfloat16)])
def test_other_widths(device, spans, G, K, V, dtype):
    cases.check(device, DECAY, T=700, H=8, G=G, K=K, V=V, dtype=dtype)
    assert "span_output_kernel" in spans
    cases.check(device, DECAY, T=700, H=24, G=2, K=128, V=64, dtype=torch.bfloat16, gate="zero")


def test_a_packed_sequence_has_the_bits_that_it_has_alone(device):
    bounds = (0, 1, 1, 130, 386, 1000, 1064, 1500)
    x = cases.make(device, DECAY, T=bounds[-1], H=4, K=128, V=64, dtype=torch.bfloat16)
    do = cases.cotangent(x)
    packed = cases.run(x, do, cu_seqlens=torch.tensor(bounds, device=device))
    for start, end in pairwise(bounds):
        if start < end:
            alone = cases.run({name: y[:, start:end] for name, y in x.items()}, do[:, start:end])
            cases.assert_same_bits(x, [y[:, start:end] for y in packed], alone)


@pytest.mark.parametrize("T", [1000, 16384])
def test_every_call_has_the_same_bits(device, T):
    """Forty calls, half of them with the states that the forward pass keeps."""
    x = cases.make(device, DECAY, T=T, H=12, K=128, V=64, dtype=torch.bfloat16)
    do = cases.cotangent(x)
    first = [*decay.forward(**x), *decay.backward(do, **x)]
    for call in range(40):
        o, *kept = decay.forward(**x, keep=call % 2 == 0)
        told = decay.kept_shapes(x["q"], x["v"], x["level_scales"]) if kept else []
        assert [(tuple(y.shape), y.dtype) for y in kept] == told
        assert (len(kept) > 0) == (call % 2 == 0)
        cases.assert_same_bits(x, [o, *decay.backward(do, **x, kept=tuple(kept))], first)
