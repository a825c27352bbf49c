"""The delta rule's forward against float64, and to the bit where only the arrangement of the input differs."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from cases import BFLOAT16, INTERPRETED
from cases_delta import FULL_WIDTHS, check_forward, config_for, make, run_forward

from loglinear.kernels.tree.problem import describe, packed_tables, set_bits_before

# Chunk 16 in the interpreter (a group is 128 tokens), 32 to 128 on a GPU.
LENGTHS = (1, 16, 17, 129, 273) if INTERPRETED else (1, 31, 32, 33, 63, 64, 65, 128, 129, 1000, 2048, 4097)
WIDTHS = ((24, 40),) if INTERPRETED else FULL_WIDTHS
PACKED = (0, 18, 1, 0, 131, 0) if INTERPRETED else (0, 300, 1, 0, 2500, 64, 17, 0)


@pytest.mark.parametrize("T", LENGTHS)
def test_lengths_in_float32(device, T):
    check_forward(device, T=T)


@pytest.mark.slow
def test_three_tiers(device):
    """More than 64 chunks: the third tier joins groups of groups."""
    check_forward(device, T=16 * 65 + 1 if INTERPRETED else 64 * 150)


@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_widths_and_groups(device, K, V):
    check_forward(
        device, B=1 if INTERPRETED else 2, T=36 if INTERPRETED else 200, H=2 if INTERPRETED else 4, G=1, K=K, V=V
    )


@pytest.mark.parametrize("chunk", [32, 64])
def test_chunk_sizes(device, chunk):
    """Every merge of the triangular inverse, and blocks of columns that straddle the border of ``[A | S]``."""
    config = config_for(torch.float32, 24, 16)
    launch = dataclasses.replace(config.group_maps, block_v=32)
    check_forward(device, T=2 * chunk + 5, K=24, config=dataclasses.replace(config, chunk=chunk, group_maps=launch))


@pytest.mark.parametrize("dtype", {BFLOAT16, torch.float16})
@pytest.mark.parametrize("keys", ["random", "equal"])
def test_low_precision_is_within_twice_of_plain_torch(device, dtype, keys):
    check_forward(device, T=150 if INTERPRETED else 1000, dtype=dtype, keys=keys)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="full widths take minutes in the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("K", "V"), WIDTHS)
@pytest.mark.parametrize(("H", "G"), [(4, 1), (2, 2)])
def test_low_precision_at_full_widths(device, K, V, H, G, dtype):
    check_forward(device, T=1000, H=H, G=G, K=K, V=V, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="long sequences take minutes in the interpreter")
@pytest.mark.parametrize("T", [63, 64, 65, 129, 4096, 4097, 8192])
def test_long_sequences_in_bfloat16(device, T):
    check_forward(device, T=T, H=1, K=128, V=128, L=20, dtype=torch.bfloat16)


@pytest.mark.parametrize("L", [1, 3, 6])
def test_levels_past_the_last_share_it(device, L):
    check_forward(device, T=50 if INTERPRETED else 300, L=L)


@pytest.mark.parametrize("gate", ["none", "zero", "strong", "very negative", "reset"])
def test_gates(device, gate):
    check_forward(device, T=50 if INTERPRETED else 1500, gate=gate)


def test_equal_keys_at_full_strength(device):
    """β = 2 reflects: ``(I + N)⁻¹`` stays small while the powers of N do not."""
    check_forward(device, T=60 if INTERPRETED else 1000, keys="equal", gate="zero")


def test_a_reset_forgets_exactly(device):
    """After g = -inf nothing of what came before is left, not even its rounding."""
    x = make(device, T=60 if INTERPRETED else 1500)
    cut = x["v"].shape[1] // 2 + 3
    x["g"][:, cut] = float("-inf")
    before = run_forward(x)
    x["v"][:, :cut] *= 1000
    after = run_forward(x)
    assert torch.equal(before[:, cut:], after[:, cut:])
    assert not torch.equal(before[:, :cut], after[:, :cut])


def test_nothing_is_written_without_strength(device):
    x = make(device, T=40)
    x["beta"].zero_()
    assert (run_forward(x) == 0).all()


def test_packed_sequences_equal_single_ones(device):
    x = make(device, T=sum(PACKED))
    bounds = torch.tensor((0, *PACKED)).cumsum(0)
    packed = run_forward(x, cu_seqlens=bounds.to(device=device, dtype=torch.int32))
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        if start < end:
            single = run_forward({name: y[:, start:end] for name, y in x.items()})
            assert torch.equal(packed[:, start:end], single)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="more than a minute in the interpreter")
def test_packed_sequences_in_three_tiers(device):
    """The tables of the higher tiers: sequences with one, two and three of them side by side."""
    x = make(device, T=9000)
    cuts = (0, 100, 5000, 8900, 9000)
    packed = run_forward(x, cu_seqlens=torch.tensor(cuts, dtype=torch.int32, device=device))
    for start, end in itertools.pairwise(cuts):
        assert torch.equal(packed[:, start:end], run_forward({name: y[:, start:end] for name, y in x.items()}))


def test_a_sequence_does_not_see_its_batch_and_runs_agree(device):
    x = make(device, B=2, T=34 if INTERPRETED else 1100, dtype=BFLOAT16)
    together = run_forward(x)
    for b in range(2):
        assert torch.equal(together[b : b + 1], run_forward({name: y[b : b + 1] for name, y in x.items()}))


def test_strided_inputs(device):
    """Slices of a fused projection are read where they lie; transposed ones are copied; both give the same bits."""
    x = make(device, B=2, T=20)
    expected = run_forward(x)
    fused = torch.cat([x[name].flatten(2) for name in ("q", "k", "v", "g", "beta")], dim=2)
    parts = fused.split([x[name].flatten(2).shape[2] for name in ("q", "k", "v", "g", "beta")], dim=2)
    sliced = {name: part.view(x[name].shape) for name, part in zip(("q", "k", "v", "g", "beta"), parts)}
    assert torch.equal(run_forward(x | sliced), expected)
    transposed = {name: y.transpose(1, 2).contiguous().transpose(1, 2) for name, y in x.items()}
    assert torch.equal(run_forward(transposed), expected)


@pytest.mark.parametrize("sizes", [{"B": 0, "T": 5}, {"B": 2, "T": 0}])
def test_nothing_to_do(device, sizes):
    x = make(device, **sizes)
    assert run_forward(x).shape == x["v"].shape


def test_tables_of_tiers_and_paths(device):
    chunks = (0, 1, 70, 0, 9)
    chunk = config_for(torch.float32, 16, 16).chunk
    bounds = torch.tensor((0, *(n * chunk for n in chunks)), device=device).cumsum(0)
    x = make(device, T=int(bounds[-1]))
    config = config_for(torch.float32, 16, 16)
    tables = packed_tables(bounds, int(bounds[-1]), chunk, tree=True)
    problem = describe(x["q"], x["v"], x["level_scales"], tables, config)
    assert [tier.sequence_groups for tier in problem.tiers] == [10, 2, 1]
    second, third = problem.tiers[1:]
    assert second.of_groups[0].units[: 1 + 2 + 1 + 1].tolist() == [1, 2, 2, 4, -1]
    assert second.of_groups[0].sequences.tolist() == [
        [0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [1, 70, 1, 1, 0],
        [10, 0, 71, 3, 0],
        [10, 9, 71, 3, 0],
    ]
    assert third.of_groups[0].sequences[:, 0].tolist() == [0, 0, 1, 3, 3]
    assert third.of_groups[0].sequences[:, 3].tolist() == [0, 0, 1, 2, 2]
    lengths = [sum(i.bit_count() for i in range((n + 7) // 8)) for n in chunks]
    assert [set_bits_before((n + 7) // 8) for n in chunks] == lengths
    assert problem.path_starts.tolist() == [sum(lengths[:i]) for i in range(5)]
    assert problem.path_slots >= sum(lengths)
