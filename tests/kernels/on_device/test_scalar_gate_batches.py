"""Packed sequences, batches, strides: the same numbers, to the bit, however a sequence arrives."""

from __future__ import annotations

import pytest
import torch
from cases import BFLOAT16, INTERPRETED, NAMES, check, config_for, make, run

from loglinear.kernels.tree.problem import packed_tables, packed_units, token_rows

LENGTHS = (0, 18, 1, 0, 131, 0) if INTERPRETED else (0, 300, 1, 0, 2500, 64, 17, 0)


def rows(results, b):
    return [None if y is None else y[b : b + 1] for y in results]


def assert_same_bits(got, expected):
    for name, x, y in zip(NAMES, got, expected):
        assert torch.equal(x, y), f"{name} differs by up to {(x.double() - y.double()).abs().max():.1e}"


def test_a_sequence_does_not_see_its_batch(device):
    x = make(device, B=2, T=34 if INTERPRETED else 1100)
    do = torch.randn_like(x["v"])
    together = run(x, do)
    for b in range(2):
        alone = run({name: y[b : b + 1] for name, y in x.items()}, do[b : b + 1])
        assert_same_bits(rows(together, b), alone)


def test_packed_sequences_equal_single_ones(device):
    x = make(device, T=sum(LENGTHS))
    do = torch.randn_like(x["v"])
    bounds = torch.tensor((0, *LENGTHS)).cumsum(0)
    packed = run(x, do, cu_seqlens=bounds.to(device=device, dtype=torch.int32))
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        if start < end:
            single = run({name: y[:, start:end] for name, y in x.items()}, do[:, start:end])
            assert_same_bits([y[:, start:end] for y in packed], single)


def test_the_same_bits_on_every_run(device):
    x = make(device, T=20 if INTERPRETED else 2000, dtype=BFLOAT16)
    do = torch.randn_like(x["v"])
    assert_same_bits(run(x, do), run(x, do))


def test_strided_inputs(device):
    """Slices of a fused projection are read where they lie; transposed ones are copied; both give the same bits."""
    x = make(device, B=2, T=20)
    do = torch.randn_like(x["v"])
    expected = run(x, do)
    fused = torch.cat([x["q"].flatten(2), x["k"].flatten(2), x["v"].flatten(2)], dim=2)
    parts = fused.split([x[name].flatten(2).shape[2] for name in "qkv"], dim=2)
    sliced = {name: part.view(x[name].shape) for name, part in zip("qkv", parts)}
    assert all(token_rows(y).data_ptr() == y.data_ptr() for y in sliced.values())
    assert_same_bits(run(x | sliced, do), expected)
    transposed = {name: y.transpose(1, 2).contiguous().transpose(1, 2) for name, y in x.items()}
    assert_same_bits(run(transposed, do.expand(2, *do.shape[1:])), expected)


def test_one_token_of_a_sequence_first_layout(device):
    """PyTorch calls these contiguous, whatever the stride of the axis of one token is."""
    x = make(device, B=2, T=1)
    do = torch.randn_like(x["v"])
    x["g"] = None

    def sequence_first(y):
        return y.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)

    transposed = {name: y if y is None else sequence_first(y) for name, y in x.items()}
    assert transposed["q"].is_contiguous()
    assert transposed["q"].stride(1) != x["q"].stride(1)
    assert_same_bits(run(transposed, sequence_first(do))[:4], run(x, do)[:4])


def test_a_gradient_that_is_broadcast(device):
    x = make(device, T=20)
    do = torch.ones(1, device=device).expand(x["v"].shape)
    assert_same_bits(run(x, do), run(x, do.contiguous()))


@pytest.mark.parametrize("sizes", [{"B": 0, "T": 5}, {"B": 2, "T": 0}])
def test_nothing_to_do(device, sizes):
    x = make(device, **sizes)
    for name, got, like in zip(NAMES, run(x, torch.ones_like(x["v"])), (x["v"], *x.values())):
        assert got.shape == like.shape, name


def test_tables_of_packed_sequences(device):
    chunk = config_for(torch.float32, 16, 16).chunk
    lengths = (0, chunk, 9 * chunk + 1, 0, 1)
    bounds = torch.tensor((0, *lengths), device=device).cumsum(0)
    units, sequences = packed_tables(bounds, sum(lengths), chunk, tree=False)
    rows, groups = packed_units(sum(lengths), len(lengths), chunk)
    assert (rows, groups) == (15, 6)
    assert units[:rows].tolist() == [1, *[2] * 10, 4, -1, -1, -1]
    assert units[rows:].tolist() == [1, 2, 2, 4, -1, -1]
    assert sequences[:, 1].tolist() == list(lengths)
    assert sequences[:, 2].tolist() == [0, 0, 1, 11, 11]
    assert sequences[:, 3].tolist() == [0, 0, 1, 3, 3]


def test_many_heads_share_a_group(device):
    check(device, T=18, H=6, G=1)
