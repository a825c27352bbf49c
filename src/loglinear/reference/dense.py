"""DENSE form: materialise ``M`` and read the definition off the page. O(T²). The oracle of every other form and kernel.

``o_t = sum_{s <= t} λ_t[level(t, s)] · (q_tᵀ Φ(t, s) k̃_s) · v_s``, that is ``O = (A ∘ M) V`` with the scores A of the
transition and the mask ``M[t, s] = λ_t[level(t, s)]``. Source: Guo et al. 2025, section 3.1 and equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loglinear.reference.finite import spoil, without_bad_tokens
from loglinear.reference.transition import DeltaRule, Transition, transition_of


def level_matrix(size: int, offset: int = 0, device: torch.device | None = None) -> Tensor:
    """int64 ``[size, size]``: ``level(t, s)`` for the tokens from ``offset`` on; entries above the diagonal mean nothing."""
    position = torch.arange(offset, offset + size, device=device)
    differing = position[:, None] ^ position[None, :]
    levels = torch.zeros_like(differing)
    for bit in range(max(offset + size - 1, 0).bit_length()):
        levels = torch.where(differing >> bit > 0, bit + 1, levels)
    return levels


def level_mask(level_scales: Tensor, offset: int = 0) -> Tensor:
    """``M[t, s] = λ_t[min(level(t, s), L - 1)]``, zero above the diagonal. ``level_scales [..., T, L]`` -> ``[..., T, T]``."""
    size, levels = level_scales.shape[-2:]
    index = level_matrix(size, offset, level_scales.device).clamp_(max=levels - 1)
    return level_scales.gather(-1, index.expand(*level_scales.shape[:-2], size, size)).tril()


def dense(
    q: Tensor, k: Tensor, v: Tensor, transition: Transition, level_scales: Tensor | None, scale: float = 1.0
) -> Tensor:
    """Log-linear attention by definition.

    Args:
        q, k: ``[..., T, K]``, heads among the leading axes. v: ``[..., T, V]``.
        transition: the gate, with the same leading axes.
        level_scales: λ ``[..., T, L]``; levels from L on share the last. None is λ = 1, the linear model.
        scale: factor of q.

    Returns:
        ``[..., T, V]``, NaN from the first token on whose k, v or gate is not finite.
    """
    beta = transition.beta if isinstance(transition, DeltaRule) else None
    k, v, g, beta, bad = without_bad_tokens(k, v, transition.g, beta)
    scores = transition_of(g, beta, k).scores(q * scale, k)
    out = (scores if level_scales is None else scores * level_mask(level_scales)) @ v
    return spoil(out, bad.cumsum(-1) > 0)
