"""Five transitions of one form: the change that a token makes to the state before it writes.

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
from functools import cached_property
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

    @cached_property
    def pairs(self) -> Tensor:
        """Decay from each token to each later one, ``[..., T, T]``, or ``[..., K, T, T]`` of a diagonal gate."""
        return segment_sum(self.g).exp_()

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT) * self.pairs

    def from_start(self) -> Tensor:
        """Decay from the start of the span through each token, ``[..., T, 1]`` or ``[..., T, K]``."""
        return self.g.cumsum(-1).exp().unsqueeze(-1)

    def to_end(self) -> Tensor:
        """Decay from after each token to the end of the span, likewise."""
        return _suffix_sum(self.g, -1).exp().unsqueeze(-1)

    def whole(self) -> Tensor:
        """Decay of the whole span, ``[..., 1]`` or ``[..., K]``."""
        return self.g.sum(-1).exp().unsqueeze(-1)

    def span(self, q: Tensor, k: Tensor, v: Tensor) -> Span:
        keys = k * self.to_end()
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

    @cached_property
    def pairs(self) -> Tensor:
        return segment_sum(self.g, -2).exp_()

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("...tk,...kts,...sk->...ts", q, self.pairs, k)

    def from_start(self) -> Tensor:
        return self.g.cumsum(-2).exp()

    def to_end(self) -> Tensor:
        return _suffix_sum(self.g, -2).exp()

    def whole(self) -> Tensor:
        return self.g.sum(-2).exp()

    def span(self, q: Tensor, k: Tensor, v: Tensor) -> Span:
        query, keys = q * self.from_start(), k * self.to_end()
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
    """``(I - β_t k_t k_tᵀ) D_t``, writing ``β_t k_t``, with the decay D of a scalar or of a diagonal gate.

    ``g [..., T]`` (Gated DeltaNet) or ``[..., T, K]`` (Kimi Delta Attention), ``beta [..., T]``,
    ``k [..., T, K]`` (the op's keys).
    """

    g: Tensor
    beta: Tensor
    k: Tensor

    @cached_property
    def gate(self) -> Scalar | Diagonal:
        """D."""
        return gate_of(self.g, self.k)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self.gate.scores(q, k) @ self._solve()

    def _solve(self) -> Tensor:
        """``(I + tril(diag(β) Z, -1))⁻¹ diag(β)``, Z the scores of the keys: corrects the written values (UT form)."""
        overlap = self.beta.unsqueeze(-1) * self.gate.scores(self.k, self.k).tril(-1)
        unit = torch.eye(self.k.shape[-2], dtype=self.k.dtype, device=self.k.device)
        return torch.linalg.solve_triangular(
            unit + overlap, torch.diag_embed(self.beta), upper=False, unitriangular=True
        )

    def span(self, q: Tensor, k: Tensor, v: Tensor) -> Span:
        gate, solve = self.gate, self._solve()
        scores = gate.scores(q, k) @ solve
        from_start = gate.from_start()
        corrected = (k * gate.to_end()).mT @ solve  # [..., K, C]: each token's write, seen from the end
        unit = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
        transition = gate.whole().unsqueeze(-1) * unit - corrected @ (k * from_start)
        query = q * from_start - scores @ (k * from_start)
        return Span(scores, query, torch.zeros_like(q[..., 0]), transition, corrected @ v)

    def step(self, state: Tensor, t: int) -> Tensor:
        key, state = self.k[..., t, :, None], self.gate.step(state, t)
        return state - self.beta[..., t, None, None] * key @ (key.mT @ state)

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


def gate_of(g: Tensor, k: Tensor) -> Scalar | Diagonal:
    """The gate of ``g [..., T]``, scalar, or ``[..., T, K]``, diagonal, beside keys ``[..., T, K]``."""
    return Diagonal(g) if g.dim() == k.dim() else Scalar(g)


def transition_of(g: Tensor, beta: Tensor | None, k: Tensor) -> Transition:
    """The transition that these gates name: a scalar or a diagonal gate, with ``beta`` under the delta rule."""
    return gate_of(g, k) if beta is None else DeltaRule(g, beta, k)
