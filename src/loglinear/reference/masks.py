"""UNIFIED VIEW: six sequence models as one formula, ``O = (A ∘ M) V``, and two ways to make A.

The module is a table. A says how much token t wants of token s, from contents alone. M says how much the memory of the
model lets through, from positions and gates alone. A row names both, and the structure of M decides how fast the row can be
computed:

    model               A           M[t, s] for s <= t               structure of M
    softmax attention   softmax     1                                (A has full rank)          O(T²)
    linear attention    dot         1                                semiseparable              O(T)
    RetNet              dot         γ^(t-s)                          semiseparable, Toeplitz    O(T)
    Mamba-2             dot         exp(g_{s+1} + … + g_t)           semiseparable              O(T)
    long convolution    dot         h_{t-s}                          Toeplitz (FFT)             O(T log T)
    log-linear          dot         λ_t[level(t,s)] · Mamba-2's M    rank-one dyadic blocks     O(T log T)

(semiseparable: every block below the diagonal has rank one, so one state carries the whole past)

    dot      A = Q Kᵀ
    softmax  A = exp(Q Kᵀ), each row divided by its sum over s <= t
    delta    A = tril(Q Kᵀ) (I + tril(diag(β) K Kᵀ, -1))⁻¹ diag(β)

``with_delta_rule`` puts the third A in a row in place of the second: linear attention becomes DeltaNet, Mamba-2 becomes
Gated DeltaNet, and log-linear Mamba-2 becomes log-linear Gated DeltaNet.

A gate per key channel is no factor of a pair, so it stands in A: ``A[t, s] = Σ_k q_tk k_sk exp(g_{s+1,k} + … + g_tk)``. The
rows with this A are ``CHANNELS``: GLA and, by the delta rule, KDA, with M = 1, and their log-linear forms, with
M[t, s] = λ_t[level(t,s)].

Plain torch, any floating dtype, differentiable, O(T²): for reading and for tests. Heads first, ``[..., T, width]``.
Source: Guo et al. 2025 (arXiv:2506.04761), sections 2 and 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loglinear import fenwick
from loglinear.reference.dense import level_mask
from loglinear.reference.transition import DeltaRule, Diagonal, segment_sum


@dataclass(frozen=True)
class Inputs:
    """The inputs of the six models. Each model uses some of them; leading axes ``...`` (batch, heads) must broadcast.

    Attributes:
        q, k: ``[..., T, K]``. v: ``[..., T, V]``.
        beta: ``[..., T]`` write strength in [0, 1] (delta rule).
        g: ``[..., T]`` natural-log decay <= 0, -inf allowed (Mamba-2, log-linear).
        gamma: ``[...]`` RetNet's constant decay γ in (0, 1].
        taps: ``[..., T]`` filter h of the long convolution, h_0 first.
        level_scales: λ ``[..., T, L]``; levels from L on share the last.
        channel_g: ``[..., T, K]`` natural-log decay per key channel (GLA, KDA); None if no such model is asked.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor
    gamma: Tensor
    taps: Tensor
    level_scales: Tensor
    channel_g: Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------- A


def dot_scores(x: Inputs) -> Tensor:
    """``Q Kᵀ``, ``[..., T, T]``; M removes the numbers above the diagonal."""
    return x.q @ x.k.mT


def softmax_scores(x: Inputs) -> Tensor:
    """``exp(Q Kᵀ)`` with each row divided by its causal sum, ``[..., T, T]``, zero above the diagonal."""
    future = torch.ones_like(x.q @ x.k.mT, dtype=torch.bool).triu(1)
    return (x.q @ x.k.mT).masked_fill(future, float("-inf")).softmax(-1)


def delta_scores(x: Inputs) -> Tensor:
    """``q_tᵀ (I - β_t k_t k_tᵀ) … (I - β_{s+1} k_{s+1} k_{s+1}ᵀ) β_s k_s``, ``[..., T, T]``, zero for s > t."""
    return DeltaRule(torch.zeros_like(x.beta), x.beta, x.k).scores(x.q, x.k)


def channel_scores(x: Inputs) -> Tensor:
    """``Σ_k q_tk k_sk exp(g_{s+1,k} + … + g_tk)``, ``[..., T, T]``, zero for s > t."""
    return Diagonal(_channel_gate(x)).scores(x.q, x.k)


def channel_delta_scores(x: Inputs) -> Tensor:
    """``q_tᵀ (I - β_t k_t k_tᵀ) diag(exp(g_t)) … β_s k_s``, ``[..., T, T]``, zero for s > t."""
    return DeltaRule(_channel_gate(x), x.beta, x.k).scores(x.q, x.k)


def _channel_gate(x: Inputs) -> Tensor:
    if x.channel_g is None:
        raise ValueError("channel_g must be a tensor [..., T, K] for a model with a gate per key channel: got None")
    return x.channel_g


# ---------------------------------------------------------------------------------------------------------------- M


def causal_mask(x: Inputs) -> Tensor:
    """1 for s <= t and 0 elsewhere, ``[T, T]``."""
    size = x.v.shape[-2]
    return x.v.new_ones(size, size).tril()


def retnet_mask(x: Inputs) -> Tensor:
    """``γ^(t-s)``, ``[..., T, T]``."""
    step = torch.arange(x.v.shape[-2], dtype=x.v.dtype, device=x.v.device)
    return (x.gamma[..., None, None] ** (step[:, None] - step).clamp_min(0)).tril()


def gate_mask(x: Inputs) -> Tensor:
    """``exp(g_{s+1} + … + g_t)``, ``[..., T, T]``: 1 on the diagonal, the product of the gates after s below it."""
    return segment_sum(x.g).exp()


def toeplitz_mask(x: Inputs) -> Tensor:
    """``h_{t-s}``, ``[..., T, T]``."""
    step = torch.arange(x.taps.shape[-1], device=x.taps.device)
    return x.taps[..., (step[:, None] - step).clamp_min(0)].tril()


def log_linear_mask(x: Inputs) -> Tensor:
    """``λ_t[level(t, s)] · exp(g_{s+1} + … + g_t)``, ``[..., T, T]``."""
    return level_mask(x.level_scales) * gate_mask(x)


def levels_mask(x: Inputs) -> Tensor:
    """``λ_t[level(t, s)]``, ``[..., T, T]``."""
    return level_mask(x.level_scales)


def dyadic_blocks(length: int) -> Iterator[tuple[int, range, range]]:
    """The blocks ``(level, rows, columns)`` on which the log-linear mask is an outer product: one per entry e.

    Entry e of the Fenwick array over ``length`` tokens holds the ``lowbit(e)`` tokens before token e (the columns) and
    is read by the ``lowbit(e)`` tokens from e on (the rows, cut at ``length``), at level ``log2(lowbit(e)) + 1``. There

        M[t, s] = λ_t[level] exp(g_e + … + g_t)  ·  exp(g_{s+1} + … + g_{e-1}),

    a column times a row. Together with the diagonal (level 0) the blocks tile the lower triangle, each pair once.
    Two blocks side by side are no longer of rank one, because their levels weigh the row differently.
    """
    for e in range(1, length):
        size = fenwick.lowbit(e)
        yield size.bit_length(), range(e, min(e + size, length)), fenwick.bucket(e)


# ------------------------------------------------------------------------------------------------------------ table


@dataclass(frozen=True)
class Row:
    """One model: its name, how A and M come from the inputs, M as a formula (mathtext), its structure and its cost."""

    name: str
    scores: Callable[[Inputs], Tensor]
    mask: Callable[[Inputs], Tensor]
    formula: str
    structure: str
    cost: str

    def output(self, x: Inputs) -> Tensor:
        """``O = (A ∘ M) V``, ``[..., T, V]``."""
        return (self.scores(x) * self.mask(x)) @ x.v


GATE = r"$e^{\,g_{s+1}+\cdots+g_t}$"
TABLE: tuple[Row, ...] = (
    Row("softmax attention", softmax_scores, causal_mask, "$1$", "A has full rank", "$O(T^2)$"),
    Row("linear attention", dot_scores, causal_mask, "$1$", "semiseparable", "$O(T)$"),
    Row("RetNet", dot_scores, retnet_mask, r"$\gamma^{\,t-s}$", "semiseparable, Toeplitz", "$O(T)$"),
    Row("Mamba-2", dot_scores, gate_mask, GATE, "semiseparable", "$O(T)$"),
    Row("long convolution", dot_scores, toeplitz_mask, "$h_{t-s}$", "Toeplitz", r"$O(T\,\log T)$"),
    Row(
        "log-linear",
        dot_scores,
        log_linear_mask,
        r"$\lambda_t[\ell(t,s)]\;$" + GATE,
        "rank-one dyadic blocks",
        r"$O(T\,\log T)$",
    ),
)


# The models whose gate per key channel is in A.
LEVELS = r"$\lambda_t[\ell(t,s)]$"
CHANNELS: tuple[Row, ...] = (
    Row("GLA", channel_scores, causal_mask, "$1$", "semiseparable", "$O(T)$"),
    Row("KDA", channel_delta_scores, causal_mask, "$1$", "semiseparable", "$O(T)$"),
    Row("log-linear GLA", channel_scores, levels_mask, LEVELS, "rank-one dyadic blocks", r"$O(T\,\log T)$"),
    Row("log-linear KDA", channel_delta_scores, levels_mask, LEVELS, "rank-one dyadic blocks", r"$O(T\,\log T)$"),
)


def with_delta_rule(row: Row) -> Row:
    """The same mask over the delta rule's A. ValueError for a row whose A is not the dot product."""
    if row.scores is not dot_scores:
        raise ValueError(f"row must have dot-product scores, which the delta rule can replace: got {row.name!r}")
    return dataclasses.replace(row, name=f"{row.name}, delta rule", scores=delta_scores)
