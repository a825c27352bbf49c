"""What the delta rule's forward keeps changes no bit of any result, is not written to, and is bounded."""

from __future__ import annotations

import dataclasses
import importlib
from math import prod

import pytest
import torch
from cases import BFLOAT16, CHANNEL_DELTA, DELTA, INTERPRETED, assert_same_bits, config_for, cotangent, make, rule_of

from loglinear.kernels import delta as delta_rule
from loglinear.kernels.delta.memory import KEPT_SHARE, heads_at_a_time, keeps_maps, map_elements
from loglinear.kernels.tree.problem import describe
from loglinear.kernels.tuning import delta_rule_config

CHUNK = 16 if INTERPRETED else 64
PACKED = (0, CHUNK + 2, 1, 0, CHUNK + 3 if INTERPRETED else 3 * CHUNK + 3)
# The interpreter takes 16 bits ten times as long.
NARROW = torch.float32 if INTERPRETED else BFLOAT16
SIZES = [(1, NARROW), (9 if INTERPRETED else 10, NARROW), (8, torch.float32), *([(2, BFLOAT16)] if INTERPRETED else [])]


@pytest.fixture(autouse=True)
def maps_are_kept(monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("loglinear.kernels.delta.forward"), "keeps_maps", lambda problem, size: True
    )


def both(x: dict, keep: bool, cu_seqlens=None, scale: float = 0.7) -> list:
    """o and the gradients of all inputs."""
    config, do = config_for(x), cotangent(x)
    common = dict(scale=scale, cu_seqlens=cu_seqlens, config=config)
    o, *kept = delta_rule.forward(**x, **common, keep=keep)
    assert bool(kept) == keep
    if keep:  # what the compiler is told before there is anything
        told = delta_rule.kept_shapes(x["q"], x["v"], x["level_scales"], cu_seqlens, config, rule_of(x).per_channel)
        assert told == [(y.shape, y.dtype) for y in kept]
    before = [y.clone() for y in kept]
    gradients = delta_rule.backward(do, **x, **common, kept=tuple(kept))
    for y, old in zip(kept, before):
        assert torch.equal(y.nan_to_num(0.5), old.nan_to_num(0.5)), "the backward wrote to what was kept"
    return [o, *gradients]


def compare(x: dict, cu_seqlens=None) -> None:
    assert_same_bits(x, both(x, True, cu_seqlens), both(x, False, cu_seqlens))


@pytest.mark.parametrize(("chunks", "dtype"), SIZES)
def test_same_bits(device, chunks, dtype):
    """A chunk, two tiers, and one with a whole group."""
    compare(make(device, DELTA, T=chunks * CHUNK - 5, dtype=dtype))


def test_same_bits_with_a_gate_per_channel(device):
    compare(make(device, CHANNEL_DELTA, T=36 if INTERPRETED else CHUNK * 10 - 5, dtype=BFLOAT16))


@pytest.mark.gpu
@pytest.mark.parametrize("rule", [DELTA, CHANNEL_DELTA])
def test_same_bits_in_three_tiers(device, rule):
    compare(make(device, rule, T=CHUNK * 66 + 1, dtype=BFLOAT16))


def test_same_bits_of_packed_sequences_without_gate(device):
    x = make(device, DELTA, T=sum(PACKED), gate="none")
    compare(x, torch.tensor((0, *PACKED), device=device).cumsum(0).int())


@pytest.mark.parametrize(("rule", "count"), [(DELTA, 1), (DELTA, 2), (CHANNEL_DELTA, 1)])
def test_same_bits_in_slices_of_heads(device, monkeypatch, rule, count):
    """A slice reads its heads where they lie among all."""
    long = (3 if INTERPRETED else 10) * CHUNK - 3
    x = make(device, rule, T=CHUNK if INTERPRETED and count == 2 else long, H=2 * count, G=2, dtype=NARROW)
    want = both(x, False)
    module = importlib.import_module("loglinear.kernels.delta.backward")
    monkeypatch.setattr(module, "heads_at_a_time", lambda *sizes: count)
    assert_same_bits(x, both(x, True), want)


def problem_of(B: int, T: int, H: int, G: int, K: int, V: int, dtype=torch.bfloat16):
    q, v, scales = (torch.empty(B, T, *x, device="meta", dtype=dtype) for x in ((G, K), (H, V), (H, 16)))
    return describe(q, v, scales, (), delta_rule_config(dtype, K, V))


def test_kept_maps_are_bounded():
    """By the bytes of q, k, v, o and gradients; a token alone, shared keys and wide heads would take more."""
    assert keeps_maps(problem_of(2, 16384, 16, 16, 128, 128), 2)
    assert keeps_maps(problem_of(1, 4096, 4, 4, 64, 64), 2)
    assert not keeps_maps(problem_of(2, 16384, 16, 1, 128, 128), 2)
    assert not keeps_maps(problem_of(2, 16384, 16, 16, 256, 256), 2)
    assert not keeps_maps(problem_of(1, 1, 2, 2, 64, 64), 2)
    assert not keeps_maps(problem_of(0, 64, 2, 2, 64, 64), 2)
    assert keeps_maps(dataclasses.replace(problem_of(2, 16384, 16, 16, 128, 128), channels=True), 2)


@pytest.mark.parametrize("channels", [False, True])
def test_elements_of_maps_are_those_that_are_kept(channels):
    """Were the rule to count less than is kept, the bound would not hold."""
    problem = dataclasses.replace(problem_of(2, CHUNK * 9, 2, 2, 16, 16), channels=channels)
    x = (torch.empty(2, CHUNK * 9, *y, device="meta", dtype=BFLOAT16) for y in ((2, 16), (2, 16), (2, 16)))
    kept = delta_rule.kept_shapes(*x, config=problem.config, channels=channels)
    assert sum(prod(shape) * dtype.itemsize for shape, dtype in kept[2:]) == 2 * 2 * map_elements(problem)


def test_slices_share_the_memory_that_is_left():
    """At the benchmark's shape half of the heads, with the maps kept or not: three times the given bytes in all."""
    problem = problem_of(2, 16384, 16, 16, 128, 128)
    assert heads_at_a_time(problem, 2, kept=True) == 8
    assert heads_at_a_time(problem, 2, kept=False) == 8
    assert heads_at_a_time(dataclasses.replace(problem, channels=True), 2, kept=True) == 8
    assert heads_at_a_time(problem_of(2, 131072, 16, 16, 128, 128), 2, kept=True) == 4
    assert heads_at_a_time(problem_of(1, 4096, 16, 16, 128, 128), 2, kept=True) == 16
    assert KEPT_SHARE * 4 * problem.tokens * 16 * 256 >= map_elements(problem) * 16
