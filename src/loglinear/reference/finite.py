"""FINITE: tokens with a NaN or an infinity are taken out before the products. The numbers that they spoil are NaN after them.

Products with a mask read a whole chunk, and 0 · NaN is NaN: as it stands, such a token would reach the outputs before it.
Gradients of outputs before it are finite too. ``g = -inf`` is a reset, not a fault.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def without_bad_tokens(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """k, v, g, beta with zeros for every token where one of them is not finite, and bool ``bad``, of v's shape but its width.

    Shapes as the ops have them (a bad k counts for all heads of its group), or heads first as in ``dense``.
    """
    bad_k, bad = (_largest(x).isfinite().logical_not() for x in (k, v))
    bad = bad | (bad_k if bad_k.shape == bad.shape else bad_k.repeat_interleave(v.shape[-2] // k.shape[-2], -1))
    open_gate = g.detach() < float("inf")  # False for NaN
    bad = bad | (open_gate if g.dim() < v.dim() else open_gate.flatten(bad.dim()).all(-1)).logical_not()
    if beta is not None:
        bad = bad | beta.detach().isfinite().logical_not()
        beta = beta.masked_fill(bad, 0.0)
    k, v = k.masked_fill(bad_k.unsqueeze(-1), 0.0), v.masked_fill(bad.unsqueeze(-1), 0.0)
    return k, v, g.masked_fill(bad.view(*bad.shape, *(1,) * (g.dim() - bad.dim())), 0.0), beta, bad


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude along the last axis; NaN where x has one. (``isfinite`` and a norm take ten times as long.)"""
    return x.detach().abs().amax(-1)


def spoiled_by(bad: Tensor, run: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens ``[N, C, H]`` and slots ``[S, M, H]`` that the bad tokens of chunks ``bad [N, C, H]`` spoil; ``run`` and
    ``spans`` are parts of the ``Layout``.
    """
    before = F.pad(bad.flatten(0, 1).cumsum(0), (0, 0, 1, 0))  # [N C + 1, H]: bad tokens before each
    of_chunk = before[:: bad.shape[1]]
    tokens = before[1:].reshape(bad.shape) > of_chunk.index_select(0, run).unsqueeze(1)
    start, end = (of_chunk.index_select(0, x.flatten()) for x in spans.unbind(-1))
    return tokens, (end > start).unflatten(0, spans.shape[:2])


def spoil(x: Tensor, where: Tensor) -> Tensor:
    """x with NaN where ``where``, of as many leading axes, says; its gradients are zero there."""
    return x.masked_fill(where.reshape(*where.shape, *(1,) * (x.dim() - where.dim())), float("nan"))
