"""MIXING: what a Log-Linear Mamba-2 mixer does between its projections, for training, as one operator.

The lines are those of the mixer: convolution, gates, λ, the op, the gated norm. Each has autograd of its own elsewhere. Here
the backward writes their gradients into the columns of one tensor, the gradient of the input projection, and nothing is
concatenated. The mixer's lines define the result. Its bits differ from theirs: one kernel each way makes the values with the
convolution, and rounds neither x nor its gradient in between.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglinear import kernels
from loglinear.ops.attention import attention
from loglinear.ops.operators import Operator


class Parts(NamedTuple):
    """Columns of the projections, or of their gradient: z, the convolution's, the time step's, λ's; views."""

    z: Tensor  # [B, T, H·V]
    channels: Tensor  # [B, T, H·V + 2·G·K]
    rate: Tensor  # [B, T, H]
    dl: Tensor  # [B, T, H·L]


class Inner(NamedTuple):
    """Columns of the convolution's output, or of its gradient; views."""

    x: Tensor  # [B, T, H, V]
    k: Tensor  # [B, T, G, K]
    q: Tensor  # [B, T, G, K]


class Mixing(NamedTuple):
    """The arguments of the operator.

    both ``[B, T, columns]``: the projections, λ's from column ``start`` on. taps, bias: of the convolution. D ``[H]``: of the
    skip. L ``[H, levels]``, offset: of λ. norm ``[H·V]``, eps, gate_first: of the gated norm. cu_seqlens: offsets of packed
    sequences, and ``place`` as the convolution has it. groups: G.
    keep: as of the op's operator.
    """

    both: Tensor
    taps: Tensor
    bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    L: Tensor
    norm: Tensor
    cu_seqlens: Tensor | None
    place: Tensor | None
    groups: int
    start: int
    offset: float
    eps: float
    gate_first: bool
    keep: str

    @property
    def columns(self) -> int:
        """V, the columns of a head."""
        return self.norm.shape[0] // self.D.shape[0]

    def parts(self, both: Tensor) -> Parts:
        inner, channels, heads = self.norm.shape[0], self.taps.shape[0], self.D.shape[0]
        z, mixed, rate = both[..., : inner + channels + heads].split([inner, channels, heads], dim=-1)
        return Parts(z, mixed, rate, both[..., self.start : self.start + self.L.numel()])

    def inner(self, mixed: Tensor) -> Inner:
        inner, keys = self.norm.shape[0], (self.taps.shape[0] - self.norm.shape[0]) // 2
        x, k, q = mixed.split([inner, keys, keys], dim=-1)
        return Inner(x.unflatten(-1, (self.D.shape[0], -1)), *(y.unflatten(-1, (self.groups, -1)) for y in (k, q)))

    def op(self, mixed: Tensor, v: Tensor, g: Tensor, scales: Tensor) -> tuple[Any, ...]:
        """The arguments of the op's operator, on its kernels."""
        _, k, q = self.inner(mixed)
        return q, k, v, g, None, scales, self.cu_seqlens, None, 1.0, 0, self.keep, "auto"


def _forward(*arguments: Any) -> list[Tensor]:
    a, own = Mixing(*arguments), kernels.pointwise
    z, channels, rate, dl = a.parts(a.both)
    g, step = own.steps.forward(rate, a.dt_bias, a.A_log)
    mixed, v = own.convolution.with_values(channels, a.taps, a.bias, a.place, step, a.columns)
    x = a.inner(mixed).x
    scales = own.level_scales.forward(dl, a.L, a.offset)
    o, *kept = attention.run(*a.op(mixed, v, g, scales))
    y = own.gated_norm.forward(o.flatten(-2), z, a.norm, x.flatten(-2), a.D, a.eps, a.gate_first)
    return [y, mixed, v, g, step, scales, o, *kept]


def _backward(dy: Tensor, *arguments: Any) -> list[Tensor | None]:
    *given, (mixed, v, g, step, scales, o, *kept) = arguments
    a, own = Mixing(*given), kernels.pointwise
    z, channels, rate, dl = a.parts(a.both)
    dboth = torch.empty_like(a.both)
    into = a.parts(dboth)
    for first, end in ((a.start - _gap(a), a.start), (a.start + a.L.numel(), a.both.shape[-1])):
        if first < end:  # columns that only pad
            dboth[..., first:end] = 0
    x = a.inner(mixed).x
    skipped = x.flatten(-2), a.D, a.eps, a.gate_first
    do, _, dnorm, _, dD = own.gated_norm.backward(dy, o.flatten(-2), z, a.norm, *skipped, into=into.z, skips=False)
    dq, dk, dv, dg, dscales = attention.differentiate(do.view_as(o), *a.op(mixed, v, g, scales), kept)
    _, dL = own.level_scales.backward(dscales, dl, a.L, a.offset, into=into.dl)
    weights = a.taps, a.bias, a.place, step, a.D  # the skip's gradient is do times D
    dstep, dtaps, dbias = own.convolution.backward_with_values(dv, do, dk, dq, channels, *weights, into.channels)
    ddt_bias, dA_log = own.steps.backward(dg, dstep, step, rate, a.dt_bias, a.A_log, into.rate)
    return [dboth, dtaps, dbias, ddt_bias, dA_log, dD, dL, dnorm]


def _gap(a: Mixing) -> int:
    """Columns between the first projection and λ's."""
    return a.start - (a.norm.shape[0] + a.taps.shape[0] + a.D.shape[0])


def _fake(*arguments: Any) -> list[Tensor]:
    a = Mixing(*arguments)
    rows, heads, inner, new = a.both.shape[:2], a.D.shape[0], a.norm.shape[0], a.both.new_empty
    y, mixed, v = (new((*rows, *x)) for x in ([inner], [a.taps.shape[0]], [heads, a.columns]))
    g, step = (new((*rows, heads), dtype=torch.float32) for _ in range(2))
    scales = new((*rows, *a.L.shape))
    return [y, mixed, v, g, step, scales, *attention.fake(*a.op(mixed, v, g, scales))]


mamba2 = Operator(
    "mamba2",
    "Tensor both, Tensor taps, Tensor? bias, Tensor dt_bias, Tensor A_log, Tensor D, Tensor L, Tensor norm, "
    "Tensor? cu_seqlens, Tensor? place, int groups, int start, float offset, float eps, bool gate_first, str keep",
    1,
    _forward,
    _backward,
    _fake,
    keeps=True,
)
