"""Inputs, the float64 oracle and the bars of the kernel tests, for a GPU and for the interpreter."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from loglinear.kernels import decay as scalar_gate
from loglinear.kernels.tuning import ScalarGateConfig, low_precision_config, scalar_gate_config

NAMES = ("o", "dq", "dk", "dv", "dg", "dlevel_scales")
INTERPRETED = not torch.cuda.is_available()
# The interpreter multiplies bfloat16 as if it were integers (triton 3.9), so there float16 stands for it.
BFLOAT16 = torch.float16 if INTERPRETED else torch.bfloat16
# Largest relative error in norm against float64. float32 is IEEE: measured below 1e-6.
FLOAT32 = 1e-5
# A 16-bit kernel may have twice the error of plain torch at its dtype (flash-attention's rule).
LOW_PRECISION_FACTOR = 2.0


def config_for(dtype: torch.dtype, key_width: int, value_width: int) -> ScalarGateConfig:
    """The tuned configuration on a GPU; in the interpreter one of the same shape whose tree is deep at few tokens."""
    if INTERPRETED:
        small = low_precision_config(chunk=16, warps=4, block_k=16, heads=2)
        return dataclasses.replace(small, segment=1, least_tile=16)
    return scalar_gate_config(dtype, key_width, value_width)


def make(
    device, B=1, T=64, H=1 if INTERPRETED else 3, G=1, K=16, V=16, L=12, dtype=torch.float32, gate="usual", seed=0
) -> dict:
    """Random inputs; λ has either sign and exact zeros."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    uniform = torch.rand(B, T, H, generator=generator)
    g = {"usual": -0.2 * uniform, "zero": 0 * uniform, "strong": -100 * uniform, "very negative": -1e4 * uniform}.get(
        gate
    )
    if gate == "reset":
        g = torch.where(torch.rand(B, T, H, generator=generator) < 0.05, float("-inf"), -0.2 * uniform)
    scales = normal(B, T, H, L)
    scales[torch.rand(B, T, H, L, generator=generator) < 0.1] = 0.0
    x = {"q": normal(B, T, G, K) / K**0.5, "k": normal(B, T, G, K), "v": normal(B, T, H, V)}
    x = {name: value.to(dtype) for name, value in x.items()} | {"g": g, "level_scales": scales}
    return {name: None if value is None else value.to(device) for name, value in x.items()}


def decay_matrix(g: Tensor) -> Tensor:
    """``exp(g_{s+1} + … + g_t)`` for s <= t, else 0, summed directly: nothing cancels. g ``[..., T]``."""
    size = g.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1)
    sums = torch.where(later, g.unsqueeze(-1), 0.0).cumsum(-2)
    return torch.where(later | torch.eye(size, dtype=torch.bool, device=g.device), sums.exp(), 0.0)


def oracle(q, k, v, g, level_scales, scale=1.0) -> Tensor:
    """The dense form in the dtype of its inputs, from the definition."""
    T, heads = v.shape[1:3]
    q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    position = torch.arange(T, device=v.device)
    level = position[:, None] ^ position[None, :]
    level = sum((level >> bit > 0).long() for bit in range(T.bit_length() + 1)).clamp(max=level_scales.shape[-1] - 1)
    scales = level_scales.transpose(1, 2)
    mask = scales.gather(-1, level.expand(*scales.shape[:2], T, T)).tril()
    if g is not None:
        mask = mask * decay_matrix(g.transpose(1, 2))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * scale
    return torch.einsum("bhts,bshv->bthv", scores * mask.to(v.dtype), v)


def differentiate(x: dict, do: Tensor, scale: float, dtype: torch.dtype | None) -> list[Tensor | None]:
    """(o, dq, dk, dv, dg, dλ) by the oracle in float64, or, without dtype, in the dtypes of x itself."""
    leaves = {
        n: None if y is None else (y if dtype is None else y.to(dtype)).detach().requires_grad_() for n, y in x.items()
    }
    o = oracle(**leaves, scale=scale)
    wanted = [y for y in leaves.values() if y is not None]
    gradients = list(torch.autograd.grad(o, wanted, do.to(o.dtype)))
    if leaves["g"] is None:
        gradients.insert(3, None)
    return [o.detach(), *gradients]


def run(x: dict, do: Tensor, scale: float = 1.0, config=None, cu_seqlens=None) -> list[Tensor | None]:
    """(o, dq, dk, dv, dg, dλ) by the kernels."""
    config = config or config_for(x["v"].dtype, x["q"].shape[3], x["v"].shape[3])
    o = scalar_gate.forward(**x, scale=scale, cu_seqlens=cu_seqlens, config=config)
    return [o, *scalar_gate.backward(do, **x, scale=scale, cu_seqlens=cu_seqlens, config=config)]


def relative(x: Tensor, expected: Tensor) -> float:
    """‖x - expected‖ / ‖expected‖; infinite if anything is not finite. What float32 cannot hold counts as zero."""
    difference = (x.double() - expected.double()).norm()
    error = (difference / expected.double().norm().clamp_min(torch.finfo(torch.float32).tiny)).item()
    return error if error < float("inf") else float("inf")


def check(device, scale: float = 0.7, config=None, **sizes) -> None:
    """Kernels against float64, all six results."""
    x = make(device, **sizes)
    do = torch.randn(x["v"].shape, generator=torch.Generator("cpu").manual_seed(9)).to(x["v"])
    expected = differentiate(x, do, scale, torch.float64)
    bars = [FLOAT32] * 6
    if x["v"].dtype != torch.float32:
        plain = differentiate(x, do, scale, None)
        bars = [0 if p is None else LOW_PRECISION_FACTOR * relative(p, e) for p, e in zip(plain, expected)]
    for name, got, want, bar in zip(NAMES, run(x, do, scale, config), expected, bars):
        if want is None:
            assert got is None
            continue
        assert got.isfinite().all(), f"{name} is not finite at {sizes}"
        error = relative(got, want)
        assert error <= bar, f"{name} has relative error {error:.2e} > {bar:.2e} at {sizes}"
