"""Packed sequences, batches, slices and strides: the same bits, however a sequence arrives at the kernels of any rule."""

from __future__ import annotations

import sys
from itertools import pairwise

import cases
import pytest
import torch
from cases import BFLOAT16, CHANNEL_DELTA, DELTA, INTERPRETED, assert_same_bits, config_of, cotangent, make, rules, run

from loglinear.kernels.tree.problem import describe, packed_tables, packed_units, set_bits_before, token_rows
from oracle import fused

PACKED = (0, 18, 1, 0, 20, 0) if INTERPRETED else (0, 300, 1, 0, 2500, 64, 17, 0)
# The interpreter takes 16 bits ten times as long.
NARROW = torch.float32 if INTERPRETED else BFLOAT16
CHUNK = 16 if INTERPRETED else 32  # of float32 kernels


def part(x: dict, rows=slice(None), tokens=slice(None)) -> dict:
    return {name: y[rows, tokens] for name, y in x.items()}


@rules
@pytest.mark.parametrize("three_tiers", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_packed_sequences_equal_single_ones(device, rule, three_tiers):
    """With three tiers, sequences of one, two and three of them side by side."""
    lengths = (100, 4900, 3900, 100) if three_tiers else PACKED
    x = make(device, rule, T=sum(lengths))
    do = cotangent(x)
    bounds = torch.tensor((0, *lengths)).cumsum(0)
    packed = run(x, do, cu_seqlens=bounds.to(device=device, dtype=torch.int32))
    for start, end in pairwise(bounds.tolist()):
        if start < end:
            tokens = slice(start, end)
            single = run(part(x, tokens=tokens), do[:, tokens])
            assert_same_bits(x, [y[:, tokens] for y in packed], single)


@rules
def test_a_sequence_does_not_see_its_batch_and_runs_agree(device, rule):
    x = make(device, rule, B=2, T=18 if INTERPRETED else 1100, dtype=NARROW)
    do = cotangent(x)
    together = run(x, do)
    for b in range(2):
        rows = slice(b, b + 1)
        assert_same_bits(x, [y[rows] for y in together], run(part(x, rows), do[rows]))


@rules
def test_strided_inputs_and_a_broadcast_gradient(device, rule):
    """Slices of a fused projection are read where they lie; transposed ones are copied; both give the same bits."""
    x = make(device, rule, B=2, T=9 if INTERPRETED else 20)
    do = torch.ones(1, device=device).expand(x["v"].shape)
    expected = run(x, do.contiguous())
    sliced = fused(x)
    assert all(token_rows(y).data_ptr() == y.data_ptr() for y in sliced.values())
    assert not sliced["g"].is_contiguous()
    assert_same_bits(x, run(sliced, do), expected)
    transposed = {name: y.transpose(1, 2).contiguous().transpose(1, 2) for name, y in x.items()}
    assert_same_bits(x, run(transposed, do), expected)


@rules
def test_one_token_of_a_sequence_first_layout(device, rule):
    """PyTorch calls these contiguous, whatever the stride of the axis of one token is."""
    x = make(device, rule, B=2, T=1)
    do = cotangent(x)
    if not rule.per_channel:
        x["g"] = None
    transposed = {name: cases.sequence_first(y) for name, y in x.items()}
    assert transposed["q"].is_contiguous()
    assert transposed["q"].stride(1) != x["q"].stride(1)
    assert_same_bits(x, run(transposed, cases.sequence_first(do)), run(x, do))


@pytest.mark.parametrize("rule", [DELTA, CHANNEL_DELTA])
def test_slices_of_heads_have_the_same_bits(device, rule, monkeypatch):
    """One head, a group, or all heads at a time."""
    x = make(device, rule, T=16 if INTERPRETED else 300, H=4, G=2)
    do, results = cotangent(x), []
    for count in (1, 4) if INTERPRETED else (1, 2, 4):
        module = sys.modules[DELTA.kernels.backward.__module__]
        monkeypatch.setattr(module, "heads_at_a_time", lambda *sizes, count=count: count)
        results.append(run(x, do))
    for sliced in results[:-1]:
        assert_same_bits(x, sliced, results[-1])


def test_tables_of_packed_sequences(device):
    lengths = (0, CHUNK, 9 * CHUNK + 1, 0, 1)
    bounds = torch.tensor((0, *lengths), device=device).cumsum(0)
    units, sequences = packed_tables(bounds, sum(lengths), CHUNK, tree=False)
    rows, groups = packed_units(sum(lengths), len(lengths), CHUNK)
    assert (rows, groups) == (15, 6)
    assert units[:rows].tolist() == [1, *[2] * 10, 4, -1, -1, -1]
    assert units[rows:].tolist() == [1, 2, 2, 4, -1, -1]
    assert sequences[:, 1].tolist() == list(lengths)
    assert sequences[:, 2].tolist() == [0, 0, 1, 11, 11]
    assert sequences[:, 3].tolist() == [0, 0, 1, 3, 3]


def test_tables_of_tiers_and_paths(device):
    chunks = (0, 1, 70, 0, 9)
    config = config_of(DELTA, torch.float32, 16, 16)
    bounds = torch.tensor((0, *(n * config.chunk for n in chunks)), device=device).cumsum(0)
    x = make(device, DELTA, T=int(bounds[-1]))
    tables = packed_tables(bounds, int(bounds[-1]), config.chunk, tree=True)
    problem = describe(x["q"], x["v"], x["level_scales"], tables, config)
    assert [tier.sequence_octets for tier in problem.tiers] == [10, 2, 1]
    second, third = problem.tiers[1:]
    assert second.of_octets[0].units[: 1 + 2 + 1 + 1].tolist() == [1, 2, 2, 4, -1]
    assert second.of_octets[0].sequences.tolist() == [
        [0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [1, 70, 1, 1, 0],
        [10, 0, 71, 3, 0],
        [10, 9, 71, 3, 0],
    ]
    assert third.of_octets[0].sequences[:, 0].tolist() == [0, 0, 1, 3, 3]
    assert third.of_octets[0].sequences[:, 3].tolist() == [0, 0, 1, 2, 2]
    lengths = [sum(i.bit_count() for i in range((n + 7) // 8)) for n in chunks]
    assert [set_bits_before((n + 7) // 8) for n in chunks] == lengths
    assert problem.path_starts.tolist() == [sum(lengths[:i]) for i in range(5)]
    assert problem.path_slots >= sum(lengths)
