"""Forward and the five gradients where the bits of positions change, and over shapes."""

from __future__ import annotations

import pytest
import torch
from cases import BFLOAT16, INTERPRETED, check

# Chunk 16 in the interpreter (a group is 128 tokens), 64 or 128 on a GPU.
LENGTHS = (1, 15, 16, 17, 129, 389) if INTERPRETED else (1, 63, 64, 65, 127, 128, 129, 1000, 2048, 4097)
WIDTHS = (
    ((24, 40), (16, 72))
    if INTERPRETED
    else ((64, 64), (128, 64), (128, 128), (64, 128), (256, 64), (96, 96), (16, 16), (40, 24), (256, 256), (128, 384))
)


@pytest.mark.parametrize("T", LENGTHS)
def test_lengths_in_float32(device, T):
    check(device, T=T)


@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_widths_and_groups(device, K, V):
    check(device, B=1 if INTERPRETED else 2, T=20 if INTERPRETED else 200, H=4, G=2, K=K, V=V)


@pytest.mark.parametrize("dtype", {BFLOAT16, torch.float16})
def test_low_precision_is_within_twice_of_plain_torch(device, dtype):
    check(device, T=150 if INTERPRETED else 1000, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="full widths take minutes in the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("K", "V"), WIDTHS)
@pytest.mark.parametrize(("H", "G"), [(4, 1), (4, 4), (6, 2)])
def test_low_precision_at_full_widths(device, K, V, H, G, dtype):
    check(device, T=1000, H=H, G=G, K=K, V=V, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="long sequences take minutes in the interpreter")
@pytest.mark.parametrize("T", [63, 64, 65, 129, 4096, 4097, 16384])
def test_long_sequences_in_bfloat16(device, T):
    check(device, T=T, H=1, K=128, V=64, L=20, dtype=torch.bfloat16)


@pytest.mark.parametrize("L", [1, 3, 6])
def test_levels_past_the_last_share_it(device, L):
    check(device, T=40 if INTERPRETED else 300, L=L)
