"""The delta rule's six gradients against float64, and to the bit where only the arrangement of the input differs."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from cases import BFLOAT16, FLOAT32, INTERPRETED, LOW_PRECISION_FACTOR, relative
from cases_delta import FULL_WIDTHS, NAMES, config_for, differentiate, make
from cases_delta import run_backward as run
from torch import Tensor

from loglinear.kernels import delta as delta_rule

# Chunk 16 in the interpreter (a group is 128 tokens), 32 or 64 on a GPU.
LENGTHS = (1, 16, 130) if INTERPRETED else (1, 31, 32, 33, 64, 65, 128, 129, 1000, 2048, 4097)
WIDTHS = ((40, 24),) if INTERPRETED else FULL_WIDTHS
PACKED = (0, 18, 1, 0, 131, 0) if INTERPRETED else (0, 300, 1, 0, 2500, 64, 17, 0)


def cotangent(x: dict) -> Tensor:
    return torch.randn(x["v"].shape, generator=torch.Generator("cpu").manual_seed(9)).to(x["v"])


def check(device, scale: float = 0.7, config=None, **sizes) -> None:
    """All gradients against float64."""
    x = make(device, **sizes)
    do = cotangent(x)
    expected = differentiate(x, do, scale, torch.float64)[1:]
    bars = [FLOAT32] * len(NAMES)
    if x["v"].dtype != torch.float32:
        plain = differentiate(x, do, scale, None)[1:]
        bars = [0 if p is None else LOW_PRECISION_FACTOR * relative(p, e) for p, e in zip(plain, expected)]
    for name, got, want, bar in zip(NAMES, run(x, do, scale, config), expected, bars):
        if want is None:
            assert got is None
            continue
        assert got.isfinite().all(), f"d{name} is not finite at {sizes}"
        error = relative(got, want)
        assert error <= bar, f"d{name} has relative error {error:.2e} > {bar:.2e} at {sizes}"


def assert_same_bits(got, expected) -> None:
    for name, x, y in zip(NAMES, got, expected):
        assert torch.equal(x, y), f"d{name} differs by up to {(x.double() - y.double()).abs().max():.1e}"


@pytest.mark.parametrize("T", LENGTHS)
def test_lengths_in_float32(device, T):
    check(device, T=T)


@pytest.mark.parametrize("chunks", [16, *([] if INTERPRETED else [19]), pytest.param(66, marks=pytest.mark.slow)])
def test_long_windows_are_summed_in_segments(device, chunks):
    """Windows of more groups than one program sums; with 16 chunks, an entry of two segments that no query reads.

    With 66 chunks there are three tiers; as with 19, windows that the end of the sequence cuts short; and
    from chunk 56 on three entries before the group, which take two products to carry.
    """
    config = dataclasses.replace(config_for(torch.float32, 16, 16), segment=1)
    check(device, T=config.chunk * (chunks - 1) + 1, config=config)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter, where 66 chunks above have as many tiers")
def test_three_tiers(device):
    check(device, T=32 * 75 + 1)


@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_widths_and_groups(device, K, V):
    check(device, B=1 if INTERPRETED else 2, T=20 if INTERPRETED else 200, H=2 if INTERPRETED else 4, G=1, K=K, V=V)


@pytest.mark.parametrize("dtype", {BFLOAT16, torch.float16})
def test_low_precision_is_within_twice_of_plain_torch(device, dtype):
    check(device, T=100 if INTERPRETED else 1000, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="full widths take minutes in the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("K", "V"), WIDTHS)
@pytest.mark.parametrize(("H", "G"), [(4, 1), (2, 2)])
def test_low_precision_at_full_widths(device, K, V, H, G, dtype):
    check(device, T=1000, H=H, G=G, K=K, V=V, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="long sequences take minutes in the interpreter")
@pytest.mark.parametrize("T", [63, 64, 65, 129, 4096, 4097, 8192])
def test_long_sequences_in_bfloat16(device, T):
    check(device, T=T, H=1, K=128, V=128, L=20, dtype=torch.bfloat16)


@pytest.mark.parametrize("L", [1, 6])
def test_levels_past_the_last_share_it(device, L):
    check(device, T=50 if INTERPRETED else 300, L=L)


@pytest.mark.parametrize("gate", ["none", "very negative", "reset"])
def test_gates(device, gate):
    check(device, T=50 if INTERPRETED else 1500, gate=gate)


def test_equal_keys_at_full_strength(device):
    check(device, T=50 if INTERPRETED else 1000, keys="equal", gate="zero")


def test_nothing_is_written_without_strength(device):
    """β = 0: the inverse is the identity, and only β itself has anything to gain from keys and values."""
    x = make(device, T=40)
    x["beta"].zero_()
    do = cotangent(x)
    got = dict(zip(NAMES, run(x, do)))
    expected = dict(zip(NAMES, differentiate(x, do, 1.0, torch.float64)[1:]))
    assert all((got[name] == 0).all() for name in NAMES if name != "beta")
    assert relative(got["beta"], expected["beta"]) <= FLOAT32


def test_packed_sequences_equal_single_ones(device):
    x = make(device, T=sum(PACKED))
    do = cotangent(x)
    bounds = torch.tensor((0, *PACKED)).cumsum(0)
    packed = run(x, do, cu_seqlens=bounds.to(device=device, dtype=torch.int32))
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        if start < end:
            single = run({name: y[:, start:end] for name, y in x.items()}, do[:, start:end])
            assert_same_bits([y[:, start:end] for y in packed], single)


def test_slices_of_heads_have_the_same_bits(device, monkeypatch):
    """One head, a group, or all heads at a time."""
    x = make(device, T=16 if INTERPRETED else 300, H=4, G=2)
    do = cotangent(x)
    results = []
    for count in (1, 2, 4):
        monkeypatch.setattr(
            sys.modules[delta_rule.backward.__module__], "heads_at_a_time", lambda *sizes, count=count: count
        )
        results.append(run(x, do))
    assert_same_bits(results[0], results[2])
    assert_same_bits(results[1], results[2])


def test_a_sequence_does_not_see_its_batch_and_runs_agree(device):
    x = make(device, B=2, T=18 if INTERPRETED else 1100, dtype=BFLOAT16)
    do = cotangent(x)
    together = run(x, do)
    for b in range(2):
        alone = run({name: y[b : b + 1] for name, y in x.items()}, do[b : b + 1])
        assert_same_bits([y[b : b + 1] for y in together], alone)


def test_strided_inputs_and_a_broadcast_gradient(device):
    x = make(device, B=2, T=9)
    do = torch.ones(1, device=device).expand(x["v"].shape)
    expected = run(x, do.contiguous())
    fused = torch.cat([x[name].flatten(2) for name in ("q", "k", "v", "g", "beta")], dim=2)
    parts = fused.split([x[name].flatten(2).shape[2] for name in ("q", "k", "v", "g", "beta")], dim=2)
    sliced = {name: part.view(x[name].shape) for name, part in zip(("q", "k", "v", "g", "beta"), parts)}
    assert_same_bits(run(x | sliced, do), expected)


@pytest.mark.parametrize("sizes", [{"B": 0, "T": 5}, {"B": 2, "T": 0}])
def test_nothing_to_do(device, sizes):
    x = make(device, **sizes)
    for name, got in zip(NAMES, run(x, cotangent(x))):
        assert got.shape == x[name].shape, name
