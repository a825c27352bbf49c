"""Inputs, the float64 oracle and the bars of the delta rule's tests, for a GPU and for the interpreter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import FLOAT32, INTERPRETED, LOW_PRECISION_FACTOR, decay_matrix, relative
from torch import Tensor

from loglinear.kernels import delta as delta_rule
from loglinear.kernels.tuning import DeltaRuleConfig, Launch, delta_rule_config, uniform_delta_config
from loglinear.reference.chunkwise import chunkwise

NAMES = ("q", "k", "v", "g", "beta", "level_scales")
# (K, V) that are tested in every dtype on a GPU: powers of two, others, and the largest that the ops give to the kernels.
FULL_WIDTHS = ((64, 64), (128, 64), (128, 128), (64, 128), (96, 96), (192, 384), (256, 256), (16, 16), (40, 24))


def config_for(dtype: torch.dtype, key_width: int, value_width: int) -> DeltaRuleConfig:
    """The tuned configuration on a GPU; in the interpreter one of the same shape whose tree is deep at few tokens."""
    if INTERPRETED:
        return uniform_delta_config(16, Launch(warps=4, stages=1, block_v=32))
    return delta_rule_config(dtype, key_width, value_width)


def make(
    device,
    B=1,
    T=64,
    H=1 if INTERPRETED else 3,
    G=1,
    K=16,
    V=16,
    L=12,
    dtype=torch.float32,
    gate="usual",
    keys="random",
    seed=0,
) -> dict:
    """Random inputs; keys have norm 1, β is in [0, 2], λ has either sign and exact zeros.

    Equal keys have components of ±1/√K, for K a power of 4: their norm is 1 to the last bit. Were it not, every transition
    ``I - 2 k kᵀ`` would be off by the same rounding error, and T of them by T times that, in any float32 arithmetic.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    uniform = torch.rand(B, T, H, generator=generator)
    gates = {"usual": -0.2 * uniform, "zero": 0 * uniform, "strong": -100 * uniform, "very negative": -1e4 * uniform}
    g = gates.get(gate)
    if gate == "reset":
        g = torch.where(torch.rand(B, T, H, generator=generator) < 0.05, float("-inf"), -0.2 * uniform)
    scales = normal(B, T, H, L)
    scales[torch.rand(B, T, H, L, generator=generator) < 0.1] = 0.0
    k = F.normalize(normal(B, T, G, K), dim=-1)
    beta = 2 * torch.rand(B, T, H, generator=generator)
    if keys == "equal":
        k, beta = (k[:, :1].sign() / K**0.5).expand_as(k).contiguous(), torch.full_like(beta, 2.0)
    x = {"q": normal(B, T, G, K), "k": k, "v": normal(B, T, H, V)}
    x = {name: value.to(dtype) for name, value in x.items()} | {"g": g, "beta": beta, "level_scales": scales}
    return {name: None if value is None else value.to(device) for name, value in x.items()}


def oracle(q, k, v, g, beta, level_scales, scale=1.0) -> Tensor:
    """The reference's chunkwise form in the dtype of its inputs."""
    g = torch.zeros_like(beta) if g is None else g
    return chunkwise(q * scale, k, v, g, level_scales, beta)[0]


def plain(q, k, v, g, beta, level_scales, scale=1.0) -> Tensor:
    """The dense form, with every product in the dtype of q, k and v; decays and the inverse in at least float32."""
    T, heads = v.shape[1:3]
    q, k = (x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2) for x in (q, k))
    position = torch.arange(T, device=v.device)
    level = position[:, None] ^ position[None, :]
    level = sum((level >> bit > 0).long() for bit in range(T.bit_length() + 1)).clamp(max=level_scales.shape[-1] - 1)
    scales = level_scales.transpose(1, 2)
    mask = scales.gather(-1, level.expand(*scales.shape[:2], T, T)).tril()
    decay = torch.ones_like(mask).tril() if g is None else decay_matrix(g.transpose(1, 2))
    strength = beta.transpose(1, 2)
    lower = (strength[..., None] * ((k @ k.mT) * decay)).tril(-1)
    right = torch.diag_embed(strength)
    inverse = torch.linalg.solve_triangular(lower, right.to(lower.dtype), upper=False, unitriangular=True)
    scores = ((q @ k.mT) * scale * decay).to(v.dtype) @ inverse.to(v.dtype)
    return ((scores * mask).to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)


def differentiate(x: dict, do: Tensor, scale: float, dtype: torch.dtype | None) -> list[Tensor | None]:
    """o and the gradients of ``NAMES``, by the oracle in ``dtype``, or, without dtype, by plain torch in those of x."""
    leaves = {
        n: None if y is None else (y if dtype is None else y.to(dtype)).detach().requires_grad_() for n, y in x.items()
    }
    o = (plain if dtype is None else oracle)(**leaves, scale=scale)
    wanted = [y for y in leaves.values() if y is not None]
    gradients = list(torch.autograd.grad(o, wanted, do.to(o.dtype)))
    if leaves["g"] is None:
        gradients.insert(NAMES.index("g"), None)
    return [o.detach(), *gradients]


def run_forward(x: dict, scale: float = 1.0, config=None, cu_seqlens=None) -> Tensor:
    config = config or config_for(x["v"].dtype, x["q"].shape[3], x["v"].shape[3])
    return delta_rule.forward(**x, scale=scale, cu_seqlens=cu_seqlens, config=config)


def run_backward(x: dict, do: Tensor, scale: float = 1.0, config=None, cu_seqlens=None) -> tuple[Tensor | None, ...]:
    """The gradients of ``NAMES``, by the kernels."""
    config = config or config_for(x["v"].dtype, x["q"].shape[3], x["v"].shape[3])
    return delta_rule.backward(do, **x, scale=scale, cu_seqlens=cu_seqlens, config=config)


def check_forward(device, scale: float = 0.7, config=None, **sizes) -> None:
    """The forward kernels against float64."""
    x = make(device, **sizes)
    expected = oracle(**{n: None if y is None else y.double() for n, y in x.items()}, scale=scale)
    bar = FLOAT32
    if x["v"].dtype != torch.float32:
        bar = LOW_PRECISION_FACTOR * relative(plain(**x, scale=scale), expected)
    got = run_forward(x, scale, config)
    assert got.isfinite().all(), f"o is not finite at {sizes}"
    error = relative(got, expected)
    assert error <= bar, f"o has relative error {error:.2e} > {bar:.2e} at {sizes}"
