"""Weights that see the bucket: ``w_ℓ = λ_ℓ · s(q, S_ℓ)``, in plain PyTorch.

λ depends on the query's token and not on what a bucket holds. Here each bucket's own read ``y_ℓ = qᵀS_ℓ`` decides with it:

    o = Σ_ℓ λ_ℓ · s_ℓ · y_ℓ        n_ℓ = |y_ℓ|²        n̄ = mean of n over the buckets that a token has

    norm     s_ℓ = n_ℓ / n̄
    probe    s_ℓ = (n_ℓ / n̄)^p · exp(wᵀ y_ℓ / |y_ℓ|), p and w learned for each head and 0 at the start: λ alone

Equal norms give s = 1. Source of the tree: Guo et al. 2025, section 3.1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from loglinear.fenwick import num_levels
from loglinear.layers.mixer import RecurrentMixer
from loglinear.layers.recurrence import convolve
from loglinear.models import LogLinearForCausalLM

Rule = Literal["norm", "probe"]
SMALL = 16  # tokens of a block whose levels are one product: smaller products are more launches than work
FLOOR = 1e-4  # added to n_ℓ / n̄, so that its logarithm stays above -9.3


def scores(q: Tensor, k: Tensor, g: Tensor, beta: Tensor | None = None, unit_length: bool = False) -> Tensor:
    """``P[t, s]``, what the value of token s weighs in the linear model's output of token t. float32 ``[B, H, T, T]``.

    Args:
        q, k: ``[B, T, G, K]``. g: ``[B, T, H]``, natural log. beta: ``[B, T, H]``, for the delta rule.
        unit_length: whether q and k are divided by their lengths first.
    """
    heads = g.shape[-1]
    q, k = (x.float().repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2) for x in (q, k))
    if unit_length:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    total = g.float().transpose(1, 2).cumsum(-1)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).clamp(max=0).exp().tril()
    if beta is None:
        return (q @ k.mT) * decay
    strength = beta.float().transpose(1, 2)
    wanted = (q @ k.mT) * decay
    known = (k @ k.mT) * decay.tril(-1) * strength.unsqueeze(-1)
    return wanted @ unit_inverse(known) * strength.unsqueeze(-2)


def unit_inverse(below: Tensor) -> Tensor:
    """``(I + below)⁻¹`` for strictly lower triangular ``[..., T, T]``, T a power of two: blocks of two, four, ... rows."""
    size, inverse = below.shape[-1], torch.ones_like(below[..., :1, :1]).expand(*below.shape[:-1], 1).unsqueeze(-1)
    while inverse.shape[-1] < size:
        half = inverse.shape[-1]
        first, second = inverse.unflatten(-3, (-1, 2)).unbind(-3)
        corner = -second @ blocks_below(below, half) @ first
        top = torch.cat([first, torch.zeros_like(first)], -1)
        inverse = torch.cat([top, torch.cat([corner, second], -1)], -2)
    return inverse.squeeze(-3)


def blocks_below(matrix: Tensor, size: int) -> Tensor:
    """``[..., T / 2 size, size, size]``: of each diagonal block of twice ``size``, the quarter at the bottom left."""
    blocks = matrix.unflatten(-1, (-1, 2, size)).unflatten(
        -4, (-1, 2, size)
    )  # [..., row block, 2, size, column block, 2, size]
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def bucket_reads(weights: Tensor, v: Tensor) -> Tensor:
    """``y [B, H, T, L, V]``: what each token reads from its bucket of each level, 0 where it has none.

    Args:
        weights: ``scores``. v: ``[B, T, H, V]``, T a power of two.
    """
    v = v.transpose(1, 2)
    size = min(SMALL, v.shape[-2])
    reads = [*small_reads(weights, v, size)]
    while size < v.shape[-2]:
        values = v.unflatten(-2, (-1, 2, size))[..., 0, :, :]
        read = blocks_below(weights, size) @ values
        reads.append(torch.stack([torch.zeros_like(read), read], -3).flatten(-4, -2))
        size *= 2
    return torch.stack([read.float() for read in reads], -2)


def small_reads(weights: Tensor, v: Tensor, size: int) -> tuple[Tensor, ...]:
    """``[B, H, T, V]`` for each level inside of blocks of ``size`` tokens: all levels in one product."""
    place = torch.arange(size, device=v.device)
    # The level is the number of bits of t XOR s.
    levels = (
        (place.unsqueeze(-1) ^ place).unsqueeze(-1).ge(1 << torch.arange(num_levels(size) - 1, device=v.device)).sum(-1)
    )
    own = levels == torch.arange(num_levels(size), device=v.device).view(-1, 1, 1)
    blocks = weights.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    read = (blocks.unsqueeze(-3) * own) @ v.unflatten(-2, (-1, size)).unsqueeze(-3)
    return read.transpose(-3, -2).flatten(-4, -3).unbind(-2)


def owned(length: int, device: torch.device) -> Tensor:
    """bool ``[T, L]``: whether a token has a bucket of each level: itself, or those of the bits that its position has."""
    position, bits = (
        torch.arange(length, device=device).unsqueeze(-1),
        torch.arange(num_levels(length) - 1, device=device),
    )
    return torch.cat([torch.ones_like(position, dtype=torch.bool), position >> bits & 1 == 1], -1)


class BucketWeights(nn.Module):
    """o of the mixing ``Σ_ℓ λ_ℓ · s_ℓ · y_ℓ``. heads: H. width: V."""

    def __init__(self, rule: Rule, heads: int, width: int) -> None:
        super().__init__()
        self.probe = rule == "probe"
        if self.probe:
            self.exponent = nn.Parameter(torch.zeros(heads, 1, 1))
            self.direction = nn.Parameter(torch.zeros(heads, 1, width, 1))
            self.exponent._no_weight_decay = self.direction._no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, inputs: dict[str, Tensor], level_scales: Tensor, unit_length: bool) -> Tensor:
        """``[B, T, H, V]`` of the mixer's inputs and λ ``[B, T, H, L]``."""
        with torch.autocast(level_scales.device.type, enabled=False):
            return weighted(inputs, level_scales, unit_length, (self.exponent, self.direction) if self.probe else None)


def weighted(
    inputs: dict[str, Tensor], level_scales: Tensor, unit_length: bool, probe: tuple[Tensor, Tensor] | None
) -> Tensor:
    """o ``[B, T, H, V]`` of the inputs and λ ``[B, T, H, L]``. probe: exponent ``[H, 1, 1]`` and direction ``[H, 1, V, 1]``."""
    v = inputs["v"]
    weights = scores(inputs["q"], inputs["k"], inputs["g"], inputs.get("beta"), unit_length)
    reads = bucket_reads(weights.to(v.dtype), v)
    w = level_scales.transpose(1, 2).float() * seen(reads, owned(v.shape[1], v.device), probe)
    return (w.unsqueeze(-1) * reads).sum(-2).transpose(1, 2).to(v.dtype)


def seen(reads: Tensor, have: Tensor, probe: tuple[Tensor, Tensor] | None) -> Tensor:
    """``s [B, H, T, L]`` of ``bucket_reads`` and ``owned``; without a probe the norm alone."""
    norms = reads.square().sum(-1)
    mean = norms.sum(-1, keepdim=True) / have.sum(-1, keepdim=True)
    ratio = norms / (mean + 1e-12)
    if probe is None:
        return ratio
    exponent, direction = probe
    unit = reads * torch.rsqrt(norms + 1e-12).unsqueeze(-1)
    return torch.exp(exponent * torch.log(ratio + FLOOR) + (unit @ direction).squeeze(-1))


class Seeing:
    """A recurrent mixer whose weights see the bucket, for whole sequences without a state."""

    def forward(self: RecurrentMixer, hidden: Tensor, *rest: object, **options: object) -> tuple[Tensor, None]:  # type: ignore[misc]
        streams = self.project(hidden)
        mixed, _ = convolve(self.conv, streams.conv, None, None, None)
        inputs, skip = self.inputs(mixed, streams)
        assert self.level_scale is not None
        o = self.bucket_weights(inputs, self.level_scale(hidden, streams.dl), self.unit_length)
        return self.outputs(o, streams.gate, skip), None


def see_buckets(model: LogLinearForCausalLM, rule: Rule, width: int) -> LogLinearForCausalLM:
    """The model with weights that see the bucket in every layer. width: V."""
    for block in model.model.layers:
        mixer = block.mixer
        mixer.bucket_weights = BucketWeights(rule, mixer.num_heads, width)
        mixer.__class__ = type(f"Seeing{type(mixer).__name__}", (Seeing, type(mixer)), {})
    return model
