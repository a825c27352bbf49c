"""RECURRENT form: a binary counter whose digits are states. O(log T) memory, one token after the other.

Reading token t: every bucket takes the token's transition, the query reads the token itself at level 0 and the bucket of
digit m at level m + 1. Writing it: a leaf arrives and, while the counter carries, merges with the bucket of that digit.
Source: Guo et al. 2025, section 3.1 (Fenwick state maintenance).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loglinear import fenwick
from loglinear.reference.transition import Transition


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    transition: Transition,
    level_scales: Tensor,
    scale: float = 1.0,
    on_merge: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The same map as ``dense``, token by token; ``on_merge(e, into)`` hears which entry joins entry ``into``.

    Shapes as in ``dense``. After t tokens the live buckets are the entries of ``fenwick.query_path(t)``.
    """
    length, levels = level_scales.shape[-2:]
    buckets: dict[int, Tensor] = {}  # entry -> state [..., K, V]
    outputs = []
    for t in range(length):
        buckets = {entry: transition.step(state, t) for entry, state in buckets.items()}
        leaf = transition.write(k, t).unsqueeze(-1) * v[..., t, :].unsqueeze(-2)
        query = scale * q[..., t, :].unsqueeze(-2)
        out = level_scales[..., t, 0, None] * (query @ leaf).squeeze(-2)
        for entry, state in buckets.items():
            at = min(fenwick.lowbit(entry).bit_length(), levels - 1)
            out = out + level_scales[..., t, at, None] * (query @ state).squeeze(-2)
        outputs.append(out)
        for entry in fenwick.merges(t + 1):
            leaf = leaf + buckets.pop(entry)
            if on_merge is not None:
                on_merge(entry, t + 1)
        buckets[t + 1] = leaf
    return torch.stack(outputs, -2) if outputs else torch.zeros_like(v)
