"""Inputs, the float64 reference and the bars of the kernel tests, for a GPU and for the interpreter.

A *rule* is a family of kernels: ``DECAY``, the scalar gate, ``CHANNEL``, the gate per key channel, or ``DELTA``, the delta
rule. Inputs are a dictionary in the order of its kernels, and tell the rule: only the delta rule has a beta.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.kernels import channel, decay, delta, tuning
from loglinear.reference.chunkwise import chunkwise
from oracle import LOW_PRECISION_FACTOR, TOLERANCES, plain_torch

INTERPRETED = not torch.cuda.is_available()
# The interpreter multiplies bfloat16 as if it were integers (triton 3.9), so there float16 stands for it.
BFLOAT16 = torch.float16 if INTERPRETED else torch.bfloat16
FLOAT32 = TOLERANCES[torch.float32]


class Rule(NamedTuple):
    """A family of kernels, the names of its inputs in their order, and its tuned configuration by dtype, K and V.

    ``per_channel``: its gate has a value for each channel of a key.
    """

    kernels: ModuleType
    inputs: tuple[str, ...]
    tuned: Any
    per_channel: bool = False


DECAY = Rule(decay, ("q", "k", "v", "g", "level_scales"), tuning.scalar_gate_config)
CHANNEL = Rule(channel, ("q", "k", "v", "g", "level_scales"), tuning.channel_config, per_channel=True)
DELTA = Rule(delta, ("q", "k", "v", "g", "beta", "level_scales"), tuning.delta_rule_config)
CHANNEL_DELTA = DELTA._replace(per_channel=True)
RULES = {"scalar gate": DECAY, "delta rule": DELTA, "channel gate": CHANNEL, "channel delta rule": CHANNEL_DELTA}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def rule_of(x: dict) -> Rule:
    per_channel = x["g"] is not None and x["g"].dim() == 4
    return next(
        rule for rule in RULES.values() if ("beta" in x, per_channel) == ("beta" in rule.inputs, rule.per_channel)
    )


def config_of(rule: Rule, dtype: torch.dtype, K: int, V: int):
    """The tuned configuration on a GPU; in the interpreter one of the same shape whose tree is deep at few tokens."""
    if not INTERPRETED:
        return rule.tuned(dtype, K, V)
    if rule.kernels is delta:
        return tuning.uniform_delta_config(32 if rule.per_channel else 16, tuning.Launch(warps=4, stages=1, block_v=32))
    if rule is CHANNEL:
        return tuning.uniform_channel_config(16, 16, tuning.Launch(warps=4, stages=1, block_v=16, block_k=16))
    small = tuning.low_precision_config(chunk=16, warps=4, block_k=16, heads=2)
    return dataclasses.replace(small, segment=1, least_tile=16)


def config_for(x: dict):
    return config_of(rule_of(x), x["v"].dtype, x["q"].shape[3], x["v"].shape[3])


def make(
    device, rule, B=1, T=64, H=1 if INTERPRETED else 3, G=1, K=16, V=16, L=12, dtype=torch.float32, gate="usual",
    keys="random", seed=0,
) -> dict:  # fmt: skip
    """Random inputs; λ has either sign and exact zeros. With the delta rule keys have norm 1, and β is in [0, 2].

    Equal keys have components of ±1/√K, for K a power of 4: their norm is 1 to the last bit. Were it not, every transition
    ``I - 2 k kᵀ`` would be off by the same rounding error, and T of them by T times that, in any float32 arithmetic.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    uniform = torch.rand(B, T, H, *([K] if rule.per_channel else []), generator=generator)
    factors = {
        "usual": 0.2,
        "zero": 0,
        "weak": 2e-3,
        "strong": 100,
        "very negative": 1e5,  # sums below -1e6 in every chunk
        "reset": 0.2,
        "one channel": 0.2,
    }
    g = -factors[gate] * uniform if gate in factors else None
    if gate == "reset":
        g[torch.rand(g.shape, generator=generator) < 0.05] = float("-inf")
    if gate == "one channel":
        g[..., 1] = -1e4
    scales = normal(B, T, H, L)
    scales[torch.rand(B, T, H, L, generator=generator) < 0.1] = 0.0
    x = {"q": normal(B, T, G, K), "k": normal(B, T, G, K), "v": normal(B, T, H, V)}
    if "beta" not in rule.inputs:
        x["q"] /= K**0.5
    else:
        x["k"], x["beta"] = F.normalize(x["k"], dim=-1), 2 * torch.rand(B, T, H, generator=generator)
        if keys == "equal":
            x["k"] = (x["k"][:, :1].sign() / K**0.5).expand_as(x["k"]).contiguous()
            x["beta"].fill_(2.0)
    x = {name: y.to(dtype) if name in "qkv" else y for name, y in x.items()} | {"g": g, "level_scales": scales}
    return {name: None if x[name] is None else x[name].to(device) for name in rule.inputs}


def sequence_first(y: Tensor | None) -> Tensor | None:
    """The same values with the strides of ``[T, B, ...]``."""
    return None if y is None else y.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)


def cotangent(x: dict) -> Tensor:
    """The gradient of o."""
    return torch.randn(x["v"].shape, generator=torch.Generator("cpu").manual_seed(9)).to(x["v"])


def reference(q, k, v, g, level_scales, beta=None, scale=1.0) -> Tensor:
    """The reference's chunkwise form in the dtype of its inputs."""
    g = torch.zeros_like(v[..., 0]) if g is None else g
    return chunkwise(q * scale, k, v, g, level_scales, beta)[0]


def wide(x: dict) -> dict:
    """x in float64."""
    return {name: None if y is None else y.double() for name, y in x.items()}


def differentiate(form, x: dict, do: Tensor, scale: float) -> list[Tensor | None]:
    """o and the gradients of all inputs by a form in plain PyTorch, in the dtypes of x; None for an input of None."""
    leaves = {name: None if y is None else y.detach().requires_grad_() for name, y in x.items()}
    o = form(**leaves, scale=scale)
    grads = iter(torch.autograd.grad(o, [y for y in leaves.values() if y is not None], do.to(o.dtype)))
    return [o.detach(), *(None if y is None else next(grads) for y in leaves.values())]


def exact(x: dict, do: Tensor, scale: float = 1.0) -> list[Tensor | None]:
    return differentiate(reference, wide(x), do, scale)


def forward(x: dict, scale: float = 1.0, config=None, cu_seqlens=None) -> Tensor:
    """o by the kernels."""
    return rule_of(x).kernels.forward(**x, scale=scale, cu_seqlens=cu_seqlens, config=config or config_for(x))[0]


def run(x: dict, do: Tensor, scale: float = 1.0, config=None, cu_seqlens=None) -> list[Tensor | None]:
    """o and the gradients of all inputs by the kernels."""
    config = config or config_for(x)
    o = forward(x, scale, config, cu_seqlens)
    return [o, *rule_of(x).kernels.backward(do, **x, scale=scale, cu_seqlens=cu_seqlens, config=config)]


def names_of(x: dict) -> list[str]:
    """Names of the results of ``run``."""
    return ["o", *(f"d{name}" for name in x)]


def relative(x: Tensor, expected: Tensor) -> float:
    """‖x - expected‖ / ‖expected‖; infinite if anything is not finite. What float32 cannot hold counts as zero."""
    difference = (x.double() - expected.double()).norm()
    error = (difference / expected.double().norm().clamp_min(torch.finfo(torch.float32).tiny)).item()
    return error if error < float("inf") else float("inf")


def check(device, rule, scale: float = 0.7, config=None, gradients: bool = True, bar: float = FLOAT32, **sizes) -> None:
    """Kernels against float64: o and all gradients, within ``bar`` or twice the error of plain PyTorch at 16 bits."""
    x = make(device, rule, **sizes)
    do = cotangent(x)
    expected = exact(x, do, scale)
    bars = [bar] * len(expected)
    if x["v"].dtype != torch.float32 and bar == FLOAT32:
        rounded = differentiate(plain_torch, x, do, scale)
        bars = [0 if p is None else LOW_PRECISION_FACTOR * relative(p, e) for p, e in zip(rounded, expected)]
    results = run(x, do, scale, config) if gradients else [forward(x, scale, config)]
    for name, got, want, bar in zip(names_of(x), results, expected, bars):
        if want is None:
            assert got is None
            continue
        assert got.isfinite().all(), f"{name} is not finite at {sizes}"
        error = relative(got, want)
        assert error <= bar, f"{name} has relative error {error:.2e} > {bar:.2e} at {sizes}"


def assert_same_bits(x: dict, got, expected) -> None:
    for name, a, b in zip(names_of(x), got, expected, strict=True):
        same = (a is None and b is None) or torch.equal(a, b)
        assert same, f"{name} differs by up to {(a.double() - b.double()).abs().max():.1e}"
