"""A convolution model of long filters, the Toeplitz mask of the unified view: ``O = (Q Kᵀ ∘ M) V`` with ``M[t, s] = h[t - s]``.

Each channel has q, k and v of width one and a filter as long as the sequence, ``o_t = q_t Σ_{s ≤ t} h[t - s] k_s v_s``, which a
Fourier transform computes in O(T log T). A filter is a sum of damped waves, ``h[t] = Σ_j a_j e^{-d_j t} cos(ω_j t)``, so it has
the same parameters at every length. Nothing in it depends on the content but q and k. Sources: Poli et al. 2023 (Hyena) for the
gates, Gu et al. 2022 (S4D) for the filter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loglinear.models import LogLinearConfig, LogLinearForCausalLM

WAVES = 16  # of a filter
SHORT = 4  # taps of the convolution over q, k and v, as in the other mixers


def damped(rate: Tensor, wave: Tensor, amount: Tensor, time: Tensor) -> Tensor:
    """A wave of each channel ``[channels, T]``."""
    return amount[:, None] * torch.exp(-rate[:, None] * time) * torch.cos(wave[:, None] * time)


class LongFilter(nn.Module):
    """The mixer ``[B, T, hidden_size] -> [B, T, hidden_size]``, for whole sequences.

    Args:
        hidden_size: width of input and output. inner: channels. longest: tokens over which the slowest wave decays.
    """

    def __init__(self, hidden_size: int, inner: int, longest: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(hidden_size, 3 * inner, bias=False)
        self.short = nn.Conv1d(3 * inner, 3 * inner, SHORT, groups=3 * inner, padding=SHORT - 1)
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)
        rates = torch.exp(torch.empty(inner, WAVES).uniform_(math.log(1 / longest), math.log(0.5)))
        self.log_rate = nn.Parameter(rates.log())
        self.wave = nn.Parameter(rates * torch.randn(inner, WAVES))  # a wave turns a few times while it decays
        self.amount = nn.Parameter(torch.randn(inner, WAVES) * (rates / WAVES).sqrt())
        self.skip = nn.Parameter(torch.ones(inner))
        for parameter in (self.log_rate, self.wave, self.amount):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def filters(self, length: int) -> Tensor:
        """h, float32 ``[channels, T]``."""
        time = torch.arange(length, device=self.wave.device, dtype=torch.float32)
        h = torch.zeros(len(self.skip), length, device=self.wave.device)
        for one in zip(self.log_rate.exp().unbind(1), self.wave.unbind(1), self.amount.unbind(1)):
            h = h + checkpoint(damped, *one, time, use_reentrant=False)  # or the backward holds all waves at once
        return h

    def forward(self, hidden: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """(output, no state); the other arguments of a mixer are those of states, which it has none of."""
        length = hidden.shape[1]
        mixed = self.short(self.in_proj(hidden).transpose(1, 2))[..., :length]
        q, k, v = mixed.float().chunk(3, dim=1)
        with torch.autocast(hidden.device.type, enabled=False):
            u = k * v
            transformed = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(self.filters(length), n=2 * length)
            y = torch.fft.irfft(transformed, n=2 * length)[..., :length] + self.skip[:, None] * u
        return self.out_proj((q * y).transpose(1, 2).to(mixed.dtype)), None


def long_filter_model(config: LogLinearConfig) -> LogLinearForCausalLM:
    """The decoder of ``config`` with a ``LongFilter`` in place of every mixer."""
    model = LogLinearForCausalLM(config)
    for block in model.model.layers:
        block.mixer = LongFilter(config.hidden_size, 2 * config.hidden_size, config.max_position_embeddings)
        for layer in (block.mixer.in_proj, block.mixer.out_proj):
            nn.init.normal_(layer.weight, std=config.initializer_range)
    return model
