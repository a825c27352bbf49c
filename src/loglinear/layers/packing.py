"""Packed sequences, in index arithmetic.

Several sequences stand one behind the other along T of a batch of one; ``cu_seqlens [n + 1]`` holds their offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor


def locate_tokens(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Of each of ``length`` packed tokens: its sequence, and how many tokens of that sequence stand before it (int64).

    ``rows[locate_tokens(...)]`` reads or writes padded rows ``[n, width, ...]`` in packed order. Does not wait for the device.
    """
    tokens = torch.arange(length, device=cu_seqlens.device)
    offsets = cu_seqlens.long()
    sequence = torch.searchsorted(offsets, tokens, right=True) - 1  # the last offset at or before: skips empty ones
    return sequence, tokens - offsets[sequence]
