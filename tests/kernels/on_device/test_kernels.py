"""The kernels of all rules: outputs and all gradients against float64, where the bits of positions change and over shapes."""

from __future__ import annotations

import dataclasses

import cases
import pytest
import torch
from cases import CHANNEL, CHANNEL_DELTA, DECAY, DELTA, FLOAT32, INTERPRETED, RULES, check, make, rules, run

# Chunk 16 in the interpreter, 32 to 128 on a GPU. Longer ones in the interpreter: test_stages.py.
LENGTHS = (1, 16, 33) if INTERPRETED else (1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 2048, 4097)
# (K, V): powers of two, others, and the largest that the ops give to the kernels.
WIDTHS = ((64, 64), (128, 64), (128, 128), (64, 128), (96, 96), (256, 256), (16, 16), (40, 24))
FULL_WIDTHS = [(rule, K, V) for rule in RULES for K, V in WIDTHS if not RULES[rule].per_channel or K <= 128]
FULL_WIDTHS += [("scalar gate", 128, 384), ("scalar gate", 256, 64), ("delta rule", 192, 384)]
FULL_WIDTHS += [("channel gate", 128, 192), ("channel gate", 16, 320), ("channel delta rule", 64, 320)]
FEW_WIDTHS = [("scalar gate", 24, 72), ("delta rule", 40, 24), ("channel gate", 40, 24), ("channel delta rule", 40, 24)]
T = 36 if INTERPRETED else 1500


@rules
@pytest.mark.parametrize("T", LENGTHS)
def test_lengths_in_float32(device, rule, T):
    check(device, rule, T=T)


@rules
@pytest.mark.parametrize(
    "chunks", [pytest.param(n, marks=pytest.mark.gpu if n != 66 else pytest.mark.slow) for n in (16, 19, 66, 150)]
)
def test_long_windows_are_summed_in_segments(device, rule, chunks):
    """Windows of more groups than one program sums; with 16 chunks, an entry of two segments that no query reads.

    With 66 chunks the delta rule has three tiers; as with 19, windows that the end of the sequence cuts short; and
    from chunk 56 on three entries before the group, which take two products to carry.
    """
    if rule is CHANNEL or (rule is not DELTA and INTERPRETED):
        pytest.skip("no windows; or others have such windows, and the scalar gate has no tiers")
    config = dataclasses.replace(cases.config_of(rule, torch.float32, 16, 16), segment=1)
    check(device, rule, T=config.chunk * (chunks - 1) + 1, config=config)


@pytest.mark.parametrize(("rule", "K", "V"), FEW_WIDTHS if INTERPRETED else FULL_WIDTHS)
def test_widths_and_groups(device, rule, K, V):
    sizes = {"T": 20, "G": 2} if INTERPRETED else {"B": 2, "T": 200, "G": 1}
    check(device, RULES[rule], H=4, K=K, V=V, **sizes)


@rules
@pytest.mark.parametrize("dtype", {cases.BFLOAT16, torch.float16})
@pytest.mark.parametrize("keys", ["random", "equal"])
def test_low_precision_is_within_twice_of_plain_torch(device, rule, dtype, keys):
    if "beta" not in rule.inputs and keys == "equal":
        pytest.skip("of no interest without a delta rule")
    random = keys == "random"  # gradients of equal keys grow with T, and what plain PyTorch costs with them
    check(device, rule, T=40 if INTERPRETED else 1000, dtype=dtype, keys=keys, gradients=random)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rule", "K", "V"), FULL_WIDTHS)
@pytest.mark.parametrize(("H", "G", "gate"), [(4, 1, "usual"), (4, 1, "weak"), (2, 2, "usual"), (6, 2, "usual")])
def test_low_precision_at_full_widths(device, rule, K, V, H, G, gate, dtype):
    """Usual gates forget within a chunk; under weak ones the tree counts as much as the chunk."""
    T = 300 if RULES[rule].per_channel else 1000  # its bar in plain PyTorch takes T·T·K numbers
    check(device, RULES[rule], T=T, H=H, G=G, K=K, V=V, gate=gate, dtype=dtype)


@pytest.mark.gpu
@rules
@pytest.mark.parametrize("T", [63, 64, 65, 129, 4096, 4097, 8192, 16384])
def test_long_sequences_in_bfloat16(device, rule, T):
    if {DECAY: 16384, DELTA: 8192}.get(rule, 129) < T:
        pytest.skip("plain PyTorch, its bar, would take too much memory")
    check(device, rule, T=T, H=1, K=128, V=64 if rule is DECAY else 128, L=20, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [CHANNEL, CHANNEL_DELTA])
def test_a_deep_tree_of_channels(device, rule, dtype):
    """Eight levels of entries; 16 bits against 2%, which is less than the error of plain PyTorch at 500 tokens."""
    bar = 2 * FLOAT32 if dtype == torch.float32 else 0.02
    check(device, rule, T=8000, H=2, K=32, V=32, L=14, dtype=dtype, gate="weak", bar=bar)


@pytest.mark.parametrize(("rule", "chunk"), [(DELTA, 32), (DELTA, 64), (CHANNEL_DELTA, 64)])
def test_chunk_sizes_of_the_delta_rule(device, rule, chunk):
    """Every merge of the triangular inverse, and blocks of columns that straddle the border of ``[A | S]``."""
    config = cases.config_of(rule, torch.float32, 24, 16)
    launch = dataclasses.replace(config.octet_maps, block_v=32)
    config = dataclasses.replace(config, chunk=chunk, octet_maps=launch)
    check(device, rule, T=chunk + 5 if INTERPRETED else 2 * chunk + 5, K=24, config=config)


@rules
@pytest.mark.parametrize("L", [1, 6] if INTERPRETED else [1, 3, 6])
def test_levels_past_the_last_share_it(device, rule, L):
    check(device, rule, T=36 if INTERPRETED else 300, L=L)


@rules
@pytest.mark.parametrize("gate", ["none", "zero", "strong", "very negative", "one channel", "reset"])
def test_gates(device, rule, gate):
    if INTERPRETED and (gate in ("zero", "strong") or (rule is CHANNEL and gate == "very negative")):
        pytest.skip("between the others")
    if gate == ("none" if rule.per_channel else "one channel"):
        pytest.skip("of the other rules")
    check(device, rule, T=T, gate=gate)


def test_equal_keys_at_full_strength(device):
    """β = 2 reflects: ``(I + N)⁻¹`` stays small while the powers of N do not."""
    check(device, DELTA, T=T if INTERPRETED else 1000, keys="equal", gate="zero")


@rules
def test_a_reset_forgets_exactly(device, rule):
    """After g = -inf nothing of what came before is left, not even its rounding; and it has no gradient."""
    x = make(device, rule, T=T)
    cut = T // 2 + 3
    x["g"][:, cut] = float("-inf")
    do = torch.ones_like(x["v"])
    before, *grads = run(x, do)
    dg = dict(zip(x, grads))["g"]
    assert (dg[:, cut] == 0).all()
    assert (dg[:, cut + 1 :] != 0).any()
    x["v"][:, :cut] *= 1000
    after = cases.forward(x)
    assert torch.equal(before[:, cut:], after[:, cut:])
    assert not torch.equal(before[:, :cut], after[:, :cut])


def test_nothing_is_written_without_strength(device):
    """β = 0: the inverse is the identity, and only β itself has anything to gain from keys and values."""
    x = make(device, DELTA, T=20)
    x["beta"].zero_()
    do = cases.cotangent(x)
    o, *got = run(x, do)
    assert (o == 0).all()
    for name, gradient, want in zip(x, got, cases.exact(x, do)[1:]):
        assert (gradient == 0).all() or (name == "beta" and cases.relative(gradient, want) <= FLOAT32)


@rules
@pytest.mark.parametrize("sizes", [{"B": 0, "T": 5}, {"B": 2, "T": 0}])
def test_nothing_to_do(device, rule, sizes):
    x = make(device, rule, **sizes)
    for got, like in zip(run(x, cases.cotangent(x)), (x["v"], *x.values()), strict=True):
        assert got.shape == like.shape
