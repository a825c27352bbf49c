"""Small models of one shape as one: every weight has a leading axis of S copies, and a step trains all of them.

A model of width 32 waits for launches. S copies launch as often as one and compute S times as much. The copies have learning
rates and gradient norms of their own, so they are S separate trainings. The forward pass is the library's, for Mamba-2, Gated
DeltaNet and their log-linear forms, written for weights ``[S, ...]`` and activations ``[S, B, T, ...]``;
``tests/experiments/test_stacked.py`` compares it with the library's models. Its pointwise work is for the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bucket_weights import weighted
from loglinear import log_linear_attention, log_linear_delta_rule
from loglinear.layers import LogLinearGatedDeltaNet, LogLinearMamba2
from loglinear.models import LogLinearForCausalLM
from loglinear.tasks.mqar.train import CLIP

EPS = 1e-6  # of every norm
ALIGNED = 32  # numbers: weights whose rows begin at multiples of 128 bytes
BETAS, ADAM_EPS = (0.9, 0.95), 1e-8
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """The sizes that all models of a stack share.

    delta: whether the mixer is Gated DeltaNet. low: dtype of products. offset: λ = softplus(L · dl + offset); None is a linear
    model. levels: how many λ are read, from the first on; tokens further away share the last one. None is all. rule: of
    ``bucket_weights``, if the weights see the bucket.
    """

    delta: bool
    layers: int
    heads: int
    key_dim: int
    value_dim: int
    low: torch.dtype
    offset: float | None
    levels: int | None = None
    rule: str | None = None

    @staticmethod
    def of(model: LogLinearForCausalLM, low: torch.dtype) -> Shape:
        """Raises ValueError for a model that ``hidden_states`` does not know."""
        config, mixer = model.config, model.model.layers[0].mixer
        delta = isinstance(mixer, LogLinearGatedDeltaNet)
        known = delta or (isinstance(mixer, LogLinearMamba2) and mixer.num_groups == 1)
        if not known or config.intermediate_size or not config.tie_word_embeddings:
            raise ValueError(f"model must be Mamba-2 or Gated DeltaNet, tied and without MLPs: got {config.mixer}")
        sizes = (
            (config.delta_key_dim, config.delta_value_dim)
            if delta
            else (config.mamba_state_size, config.mamba_head_dim)
        )
        offset = None if mixer.level_scale is None else mixer.level_scale.offset
        seeing = getattr(mixer, "bucket_weights", None)
        rule = None if seeing is None else ("probe" if seeing.probe else "norm")
        return Shape(delta, config.num_hidden_layers, mixer.num_heads, *sizes, low, offset, rule=rule)


def hidden_states(p: Weights, tokens: Tensor, shape: Shape) -> Tensor:
    """float32 ``[S, B, T, width]`` behind the last norm, for tokens ``[S, B, T]``."""
    table = p["model.embed_tokens.weight"]
    copies, words, _ = table.shape
    first = words * torch.arange(copies, device=tokens.device).view(-1, 1, 1)
    x = F.embedding(tokens + first, table.flatten(0, 1))
    for i in range(shape.layers):
        layer = {name.removeprefix(f"model.layers.{i}."): w for name, w in p.items() if f".{i}." in name}
        mixer = {name.removeprefix("mixer."): w for name, w in layer.items()}
        mix = delta_mixer if shape.delta else decay_mixer
        x = x + mix(mixer, rms_norm(x, layer["mixer_norm.weight"]), shape)
    return rms_norm(x, p["model.norm.weight"])


def decay_mixer(p: Weights, x: Tensor, shape: Shape) -> Tensor:
    """Mamba-2 on x ``[S, B, T, width]``."""
    H, K, V, inner = shape.heads, shape.key_dim, shape.value_dim, shape.heads * shape.value_dim
    z, xBC, dt = product(x, p["in_proj.weight"], shape).split([inner, inner + 2 * K, H], -1)
    v, k, q = convolve(xBC, p["conv.weight"], p["conv.bias"]).split([inner, K, K], -1)
    skip = v.unflatten(-1, (H, V))
    dt = F.softplus(dt.float() + each(p["dt_bias"]))
    v = (skip * dt.unsqueeze(-1)).to(shape.low)
    g = -torch.exp(each(p["A_log"])) * dt
    q, k = q.unsqueeze(-2), k.unsqueeze(-2)
    scales = level_scales(p, x, shape)
    y = (
        log_linear_attention(*rows(q, k, v, g, scales))[0]
        if shape.rule is None
        else seeing(p, [q, k, v, g], scales, shape)
    )
    y = y.unflatten(0, x.shape[:2]).float() + skip.float() * each(p["D"]).unsqueeze(-1)
    y = y.flatten(-2) * F.silu(z.float())
    return product(rms_norm(y, p["norm.weight"]), p["out_proj.weight"], shape)


def delta_mixer(p: Weights, x: Tensor, shape: Shape) -> Tensor:
    """Gated DeltaNet on x ``[S, B, T, width]``."""
    H, K, V = shape.heads, shape.key_dim, shape.value_dim
    qkv, gate, a, b = product(x, p["in_proj.weight"], shape).split([H * (2 * K + V), H * V, H, H], -1)
    q, k, v = convolve(qkv, p["conv.weight"]).split([H * K, H * K, H * V], -1)
    q, k = (unit(y.unflatten(-1, (H, K))).to(shape.low) for y in (q, k))
    g = -torch.exp(each(p["A_log"])) * F.softplus(a.float() + each(p["dt_bias"]))
    beta, scales = torch.sigmoid(b.float()), level_scales(p, x, shape)
    v = v.unflatten(-1, (H, V))
    if shape.rule is None:
        o, _ = log_linear_delta_rule(*rows(q, k, v, g, beta, scales))
    else:
        o = seeing(p, [q, k, v, g, beta], scales, shape)
    o = rms_norm(o.unflatten(0, x.shape[:2]).float(), p["norm.weight"].unsqueeze(1))
    return product((o * F.silu(gate.float().unflatten(-1, (H, V)))).flatten(-2), p["out_proj.weight"], shape)


def seeing(p: Weights, inputs: list[Tensor], scales: Tensor, shape: Shape) -> Tensor:
    """``[S · B, T, H, V]`` with weights that see the bucket, for q, k, v, g and the delta rule's beta ``[S, B, T, ...]``."""
    named = dict(zip(("q", "k", "v", "g", "beta"), rows(*inputs)))
    own = [p[f"bucket_weights.{name}"] for name in ("exponent", "direction")] if shape.rule == "probe" else None
    probe = None if own is None else tuple(w.repeat_interleave(scales.shape[1], 0) for w in own)
    return weighted(named, *rows(scales), unit_length=False, probe=probe)  # type: ignore[arg-type]


def level_scales(p: Weights, x: Tensor, shape: Shape) -> Tensor | None:
    """λ ``[S, B, T, H, L]``; None in a linear model."""
    if shape.offset is None:
        return None
    dl = product(x, p["level_scale.dl_proj.weight"], shape).unflatten(-1, p["level_scale.L"].shape[1:])
    scales = F.softplus(p["level_scale.L"][:, None, None] * dl.float() + shape.offset).to(shape.low)
    return scales[..., : shape.levels]


def product(x: Tensor, weight: Tensor, shape: Shape) -> Tensor:
    """x ``[S, B, T, in]`` with weight ``[S, out, in]``; a product for each row, so that weight gradients have parts to sum."""
    return x.to(shape.low) @ weight.to(shape.low).mT.unsqueeze(1)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``silu(bias + Σ_i weight[:, :, i] · x_{t-W+1+i})`` of x ``[S, B, T, C]``, weight ``[S, C, W]``."""
    taps, length = weight.shape[-1], x.shape[2]
    padded = F.pad(x.float(), (0, 0, taps - 1, 0))
    y = sum(each(weight[..., i]) * padded[:, :, i : i + length] for i in range(taps))
    return F.silu(y if bias is None else y + each(bias)).to(x.dtype)  # type: ignore[operator, arg-type]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """float32 norm of x ``[S, ..., C]`` with weight ``[S, (1,) C]``."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * each(weight)


def unit(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def each(x: Tensor) -> Tensor:
    """``[S, ...]`` beside ``[S, B, T, ...]``."""
    return x[:, None, None]


def rows(*tensors: Tensor | None) -> list[Any]:
    """``[S, B, ...]`` as ``[S · B, ...]``."""
    return [None if x is None else x.flatten(0, 1) for x in tensors]


@dataclass(eq=False)
class Adam:
    """Weights of all copies in one matrix ``[S, P]``, and AdamW on it with a rate for each copy."""

    flat: Tensor
    decays: Tensor
    first: Tensor
    second: Tensor

    def update(self, grads: Sequence[Tensor], rate: Tensor, step: Tensor) -> None:
        """rate: ``[S]``. step: ``[1]``, from 0."""
        g = torch.cat([x.flatten(1) for x in grads], 1)
        g = F.pad(g, (0, self.flat.shape[1] - g.shape[1]))
        g = g * (CLIP / (g.square().sum(1, keepdim=True).sqrt() + 1e-6)).clamp(max=1)
        self.first.lerp_(g, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).add_(g.square() * (1 - BETAS[1]))
        rate, n = rate.unsqueeze(1), step + 1
        mean, square = self.first / (1 - BETAS[0] ** n), self.second / (1 - BETAS[1] ** n)
        self.flat.mul_(1 - rate * self.decays).sub_(rate * mean / (square.sqrt() + ADAM_EPS))


class Stack:
    """S models of one shape, and their optimizer.

    Args:
        models: they differ in their weights alone.
        rates: float32 ``[steps, S]``, the learning rate of each copy in each step.
        low: dtype of products. compiled: whether the compiler fuses the pointwise work.
    """

    def __init__(
        self,
        models: Sequence[LogLinearForCausalLM],
        rates: Tensor,
        weight_decay: float,
        low: torch.dtype,
        compiled: bool,
    ) -> None:
        self.shape, self.rates, self.copies, self.compiled = Shape.of(models[0], low), rates, len(models), compiled
        own = [dict(model.named_parameters()) for model in models]
        order = sorted(own[0], key=lambda name: own[0][name].numel() % ALIGNED > 0)  # the aligned ones first
        flat = torch.cat([torch.stack([one[name].detach() for one in own]).flatten(1) for name in order], 1)
        flat = F.pad(flat, (0, -flat.shape[1] % ALIGNED)).to(rates.device)
        self.weights: Weights = {}
        self.parameters, decays = 0, torch.zeros_like(flat[:1])
        for name in order:
            p = own[0][name]
            part = slice(self.parameters, self.parameters + p.numel())
            self.parameters += p.numel()
            self.weights[name] = flat[:, part].view(self.copies, *p.shape).requires_grad_()
            if p.ndim > 1 and not getattr(p, "_no_weight_decay", False):
                decays[:, part] = weight_decay
        self.adam = Adam(flat, decays, torch.zeros_like(flat), torch.zeros_like(flat))
        self._hidden, self._update = self.wrap(hidden_states), self.wrap(Adam.update)

    def wrap(self, function: Callable) -> Callable:
        """The function, compiled if the stack is."""
        return compiler()(function) if self.compiled else function

    @property
    def table(self) -> Tensor:
        """The embeddings ``[S, words, width]``, which are the output layers too."""
        return self.weights["model.embed_tokens.weight"]

    def hidden(self, tokens: Tensor) -> Tensor:
        """``hidden_states`` of tokens ``[S, B, T]``, for a step."""
        return self._hidden(self.weights, tokens, self.shape)

    def update(self, losses: Tensor, place: Tensor) -> None:
        """A step of the optimizer on the losses ``[S]``. place: int64 ``[1]``, steps done."""
        grads = torch.autograd.grad(losses.sum(), list(self.weights.values()))
        with torch.no_grad():
            self._update(self.adam, grads, self.rates.index_select(0, place)[0], place)


@cache
def compiler() -> Callable[[Callable], Callable]:
    """The compiler for one shape after another."""
    torch._dynamo.config.cache_size_limit = 64  # a Shape each
    return partial(torch.compile, dynamic=False, fullgraph=True)
