"""Packed sequences, in index arithmetic.

Several sequences stand one behind the other along T of a batch of one; ``cu_seqlens [n + 1]`` holds their offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loglinear.ops import checks


def check_packed(x: Tensor, name: str, cu_seqlens: Tensor) -> None:
    """Raise unless x ``[1, T, ...]`` can hold these sequences; on the CPU, where that waits for nothing, by the values too."""
    checks.check_packing(x, cu_seqlens, None, name)
    if cu_seqlens.device.type == "cpu" and checks.values_are_known(cu_seqlens):
        checks.sequence_lengths(x, cu_seqlens, None)


def locate_tokens(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Of each of ``length`` packed tokens: its sequence, and how many tokens of that sequence stand before it (int64).

    ``rows[locate_tokens(...)]`` reads or writes padded rows ``[n, width, ...]`` in packed order. Does not wait for the device.
    """
    tokens = torch.arange(length, device=cu_seqlens.device)
    offsets = cu_seqlens.long()
    sequence = torch.searchsorted(offsets, tokens, right=True) - 1  # the last offset at or before: skips empty ones
    return sequence, tokens - offsets[sequence]
