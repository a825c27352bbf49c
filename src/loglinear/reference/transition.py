"""Four transitions of one form: the change that a token makes to the state before it writes.

Only this module knows how transitions differ. A transition answers the same questions over any span of tokens (a chunk, or
a whole sequence), as torch code that runs in float64 and differentiates:

    scores(q, k)      A[t, s] = q_tᵀ Φ(t, s) k̃_s for s <= t, zero above the diagonal      (the dense form)
    span(q, k, v)     the same scores, the queries seen from the start of the span, and the affine map S -> A S + S_c
    step(S, t)        one token's transition applied to a state                             (the recurrent form)

and three operations on the summaries A of spans: ``compose(later, earlier)``, ``act(A, S, log)``, ``jump(query, weight, A)``.
A state is a pair (S, log) and a query a pair (rows, weight): their true values are ``exp(log) S`` and ``exp(weight) rows``,
which lets a scalar gate move both through time by an addition.

Layout here is heads first, ``[..., T, width]``: a span is the last but one axis. Source: docs/algorithm.md;
Guo et al. 2025, sections 3.2 to 3.4; Yang et al. 2024 for the WY/UT form of the delta rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """A span of C tokens summarised: everything the tree needs to know about it."""

    scores: Tensor  # [..., C, C]
    query: Tensor  # [..., C, K] rows of the queries as seen from the start of the span
    weight: Tensor  # [..., C] log weight of those rows
    transition: Tensor  # A of the span: log [...], log [..., K] or matrix [..., K, K]
    state: Tensor  # [..., K, V] what the span adds, seen from its end


def segment_sum(g: Tensor, dim: int = -1) -> Tensor:
    """``out[t, s] = g[s+1] + ... + g[t]`` for s <= t and -inf above the diagonal, in place of axis ``dim``.

    Sums only what it needs instead of subtracting prefix sums: -inf and very negative g are exact.
    """
    g = g.movedim(dim, -1)
    size = g.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1)  # [t, s]: t > s
    sums = g.unsqueeze(-1).masked_fill(~later, 0.0).cumsum_(-2)  # in place: C floats per token, and no second copy
    return sums.masked_fill_(~later.fill_diagonal_(True), float("-inf"))


def _suffix_sum(g: Tensor, dim: int) -> Tensor:
    """``out[s] = g[s+1] + ... + g[-1]`` along ``dim``."""
    shifted = torch.cat([g.narrow(dim, 1, g.shape[dim] - 1), torch.zeros_like(g.narrow(dim, 0, 1))], dim)
    return shifted.flip(dim).cumsum(dim).flip(dim)


@dataclass
class Scalar:
    """Scalar gate ``exp(g_t)`` (Mamba-2, RetNet). ``g [..., T]``, natural log; identity is g = 0 (linear attention)."""

    g: Tensor

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT) * segment_sum(self.g).exp_()

    def span(self, q: Tensor, k: Tensor, v: Tensor) -> Span:
        keys = k * _suffix_sum(self.g, -1).exp().unsqueeze(-1)
        return Span(self.scores(q, k), q, self.g.cumsum(-1), self.g.sum(-1), keys.mT @ v)

    def step(self, state: Tensor, t: int) -> Tensor:
        return self.g[..., t, None, None].exp() * state

    def write(self, k: Tensor, t: int) -> Tensor:
        return k[..., t, :]

    @staticmethod
    def identity(state: Tensor) -> Tensor:
        return state.new_zeros(state.shape[:-2])

    @staticmethod
    def compose(later: Tensor, earlier: Tensor) -> Tensor:
        return later + earlier

    @staticmethod
    def act(a: Tensor, state: Tensor, log: Tensor) -> Tensor:
        return (a + log)[..., None, None].exp() * state

    @staticmethod
    def jump(query: Tensor, weight: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return query, weight + a.unsqueeze(-1)


class Identity(Scalar):
    """No gate: the transition of linear attention."""

    def __init__(self, like: Tensor):
        super().__init__(torch.zeros_like(like))


@dataclass
class Diagonal:
    """Diagonal gate ``diag(exp(g_t))`` (GLA and its family). ``g [..., T, K]``, natural log."""

    g: Tensor

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("...tk,...kts,...sk->...ts", q, segment_sum(self.g, -2).exp_(), k)

    def span(self, q: Tensor, k: Tensor, v: Tensor) -> Span:
        query = q * self.g.cumsum(-2).exp()
        keys = k * _suffix_sum(self.g, -2).exp()
        return Span(self.scores(q, k), query, torch.zeros_like(q[..., 0]), self.g.sum(-2), keys.mT @ v)

    def step(self, state: Tensor, t: int) -> Tensor:
        return self.g[..., t, :, None].exp() * state

    def write(self, k: Tensor, t: int) -> Tensor:
        return k[..., t, :]

    @staticmethod
    def identity(state: Tensor) -> Tensor:
        return state.new_zeros(state.shape[:-1])

    @staticmethod
    def compose(later: Tensor, earlier: Tensor) -> Tensor:
        return later + earlier

    @staticmethod
    def act(a: Tensor, state: Tensor, log: Tensor) -> Tensor:
        return (a + log[..., None])[..., None].exp() * state

    @staticmethod
    def jump(query: Tensor, weight: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return query * a[..., None, :].exp(), weight


@dataclass
class DeltaRule:
    """``exp(g_t) (I - β_t k_t k_tᵀ)``, writing ``β_t k_t``. ``g, beta [..., T]``, ``k [..., T, K]`` (the op's keys)."""

    g: Tensor
    beta: Tensor
    k: Tensor

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        decay = segment_sum(self.g).exp_()
        return ((q @ k.mT) * decay) @ self._solve(decay)

    def _solve(self, decay: Tensor) -> Tensor:
        """``(I + tril(diag(β) (K Kᵀ ∘ decay), -1))⁻¹ diag(β)``: turns written values into corrected ones (UT form)."""
        overlap = self.beta.unsqueeze(-1) * ((self.k @ self.k.mT) * decay).tril(-1)
        unit = torch.eye(self.k.shape[-2], dtype=self.k.dtype, device=self.k.device)
        return torch.linalg.solve_triangular(
            unit + overlap, torch.diag_embed(self.beta), upper=False, unitriangular=True
        )

    def span(self, q: Tensor, k: Tensor, v: Tensor) -> Span:
        decay = segment_sum(self.g).exp_()
        solve = self._solve(decay)
        scores = ((q @ k.mT) * decay) @ solve
        from_start = self.g.cumsum(-1).exp().unsqueeze(-1)
        to_end = _suffix_sum(self.g, -1).exp().unsqueeze(-1)
        corrected = (k * to_end).mT @ solve  # [..., K, C]: each token's write, seen from the end
        unit = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
        transition = self.g.sum(-1).exp()[..., None, None] * unit - corrected @ (k * from_start)
        query = q * from_start - scores @ (k * from_start)
        return Span(scores, query, torch.zeros_like(q[..., 0]), transition, corrected @ v)

    def step(self, state: Tensor, t: int) -> Tensor:
        key = self.k[..., t, :, None]
        return self.g[..., t, None, None].exp() * (state - self.beta[..., t, None, None] * key @ (key.mT @ state))

    def write(self, k: Tensor, t: int) -> Tensor:
        return self.beta[..., t, None] * k[..., t, :]

    @staticmethod
    def identity(state: Tensor) -> Tensor:
        unit = torch.eye(state.shape[-2], dtype=state.dtype, device=state.device)
        return unit.expand(*state.shape[:-2], *unit.shape)

    @staticmethod
    def compose(later: Tensor, earlier: Tensor) -> Tensor:
        return later @ earlier

    @staticmethod
    def act(a: Tensor, state: Tensor, log: Tensor) -> Tensor:
        return (log[..., None, None].exp() * a) @ state

    @staticmethod
    def jump(query: Tensor, weight: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return query @ a, weight


Transition = Scalar | Diagonal | DeltaRule


def transition_of(g: Tensor, beta: Tensor | None, k: Tensor) -> Transition:
    """The transition that these gates name: ``g [..., T]`` scalar, ``g [..., T, K]`` diagonal, with ``beta`` the delta rule."""
    if beta is not None:
        return DeltaRule(g, beta, k)
    return Diagonal(g) if g.dim() == k.dim() else Scalar(g)
