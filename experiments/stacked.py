"""Small models of one shape as one: every weight has a leading axis of S copies, and a step trains all of them.

A model of width 32 waits for launches. S copies launch as often as one and compute S times as much. The copies
have learning rates, gradient norms and weight decay of their own, so they are S separate trainings. The forward pass is the library's, for
Mamba-2, Gated DeltaNet and their log-linear forms, written for weights ``[S, ...]`` and activations ``[S, B, T, ...]``;
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

from loglinear import log_linear_attention, log_linear_delta_rule
from loglinear.models import LogLinearForCausalLM
from loglinear.tasks.mqar.config import VALUE_DIM, Cell
from loglinear.tasks.mqar.train import CLIP, answer_shares, learning_rate

EPS = 1e-6  # of every norm
ALIGNED = 32  # numbers: weights whose rows begin at multiples of 128 bytes
BETAS, ADAM_EPS = (0.9, 0.95), 1e-8
KNOWN = ("Mamba-2", "Log-Linear Mamba-2", "Gated DeltaNet", "Log-Linear Gated DeltaNet")
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What the models of a stack have in common. offset: λ = softplus(L · dl + offset)."""

    delta: bool
    layers: int
    heads: int
    key_dim: int
    low: torch.dtype
    offset: float | None

    @staticmethod
    def of(cell: Cell, model: LogLinearForCausalLM) -> Shape:
        if cell.model not in KNOWN or cell.recipe.mlp or not cell.recipe.tied:
            raise ValueError(f"cell must be one of {KNOWN}, tied and without MLPs: got {cell.model}")
        scale = model.model.layers[0].mixer.level_scale
        low = torch.bfloat16 if cell.recipe.precision == "bfloat16" else torch.float32
        offset = None if scale is None else scale.offset
        return Shape("Delta" in cell.model, cell.recipe.layers, cell.heads, cell.state_size, low, offset)


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
    H, K, V, inner = shape.heads, shape.key_dim, VALUE_DIM, shape.heads * VALUE_DIM
    z, xBC, dt = product(x, p["in_proj.weight"], shape).split([inner, inner + 2 * K, H], -1)
    v, k, q = convolve(xBC, p["conv.weight"], p["conv.bias"]).split([inner, K, K], -1)
    skip = v.unflatten(-1, (H, V))
    dt = F.softplus(dt.float() + each(p["dt_bias"]))
    v = (skip * dt.unsqueeze(-1)).to(shape.low)
    g = -torch.exp(each(p["A_log"])) * dt
    q, k = q.unsqueeze(-2), k.unsqueeze(-2)
    y, _ = log_linear_attention(*rows(q, k, v, g), rows(level_scales(p, x, shape))[0])
    y = y.unflatten(0, x.shape[:2]).float() + skip.float() * each(p["D"]).unsqueeze(-1)
    y = y.flatten(-2) * F.silu(z.float())
    return product(rms_norm(y, p["norm.weight"]), p["out_proj.weight"], shape)


def delta_mixer(p: Weights, x: Tensor, shape: Shape) -> Tensor:
    """Gated DeltaNet on x ``[S, B, T, width]``."""
    H, K, V = shape.heads, shape.key_dim, VALUE_DIM
    qkv, gate, a, b = product(x, p["in_proj.weight"], shape).split([H * (2 * K + V), H * V, H, H], -1)
    q, k, v = convolve(qkv, p["conv.weight"]).split([H * K, H * K, H * V], -1)
    q, k = (unit(y.unflatten(-1, (H, K))).to(shape.low) for y in (q, k))
    g = -torch.exp(each(p["A_log"])) * F.softplus(a.float() + each(p["dt_bias"]))
    beta, scales = torch.sigmoid(b.float()), level_scales(p, x, shape)
    o, _ = log_linear_delta_rule(*rows(q, k, v.unflatten(-1, (H, V)), g, beta, scales))
    o = rms_norm(o.unflatten(0, x.shape[:2]).float(), p["norm.weight"].unsqueeze(1))
    return product((o * F.silu(gate.float().unflatten(-1, (H, V)))).flatten(-2), p["out_proj.weight"], shape)


def level_scales(p: Weights, x: Tensor, shape: Shape) -> Tensor | None:
    """λ ``[S, B, T, H, L]``; None in a linear model."""
    if shape.offset is None:
        return None
    dl = product(x, p["level_scale.dl_proj.weight"], shape).unflatten(-1, p["level_scale.L"].shape[1:])
    return F.softplus(p["level_scale.L"][:, None, None] * dl.float() + shape.offset).to(shape.low)


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


def rows(*tensors: Tensor | None) -> list[Tensor | None]:
    """``[S, B, ...]`` as ``[S · B, ...]``."""
    return [None if x is None else x.flatten(0, 1) for x in tensors]


def losses(h: Tensor, table: Tensor, queries: Tensor, answers: Tensor, shares: Tensor) -> Tensor:
    """float32 ``[S]`` of hidden states ``[S, B, T, width]``, queries and answers ``[S, asked]`` and their shares ``[asked]``."""
    h = h.flatten(1, 2)
    logits = h.gather(1, queries.unsqueeze(-1).expand(-1, -1, h.shape[-1])) @ table.mT
    each_one = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none").view_as(answers)
    return (each_one * shares).sum(1)


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
    """S trainings of models of one shape, a step at a time.

    Args:
        cells: they differ in seed and learning rate alone. build: makes the model of a cell.
        compiled: whether the compiler fuses the pointwise work.
    """

    def __init__(self, cells: Sequence[Cell], build: Callable[[Cell], Any], device: str, compiled: bool) -> None:
        models = [build(cell) for cell in cells]
        self.cells, self.shape = tuple(cells), Shape.of(cells[0], models[0])
        own = [dict(model.named_parameters()) for model in models]
        order = sorted(own[0], key=lambda name: own[0][name].numel() % ALIGNED > 0)  # the aligned ones first
        flat = torch.cat([torch.stack([one[name].detach() for one in own]).flatten(1) for name in order], 1)
        flat = F.pad(flat, (0, -flat.shape[1] % ALIGNED)).to(device)
        self.weights: Weights = {}
        decays, start = torch.zeros_like(flat[:1]), 0
        for name in order:
            p = own[0][name]
            part = slice(start, start := start + p.numel())
            self.weights[name] = flat[:, part].view(len(cells), *p.shape).requires_grad_()
            if p.ndim > 1 and not getattr(p, "_no_weight_decay", False):
                decays[:, part] = cells[0].recipe.weight_decay
        self.adam = Adam(flat, decays, torch.zeros_like(flat), torch.zeros_like(flat))
        steps = range(cells[0].recipe.steps)
        self.rates = torch.tensor([[learning_rate(cell, step) for cell in cells] for step in steps], device=device)
        self.shares = answer_shares(cells[0]).to(device)
        wrap = compiler() if compiled else lambda f: f
        self.hidden, self.losses, self.update = wrap(hidden_states), wrap(losses), wrap(Adam.update)

    def step(self, tokens: Tensor, queries: Tensor, answers: Tensor, place: Tensor) -> Tensor:
        """``[S]`` losses before the step. tokens: ``[S, B, T]``. place: int64 ``[1]``, steps done."""
        h = self.hidden(self.weights, tokens, self.shape)
        found = self.losses(h, self.weights["model.embed_tokens.weight"], queries, answers, self.shares)
        grads = torch.autograd.grad(found.sum(), list(self.weights.values()))
        with torch.no_grad():
            self.update(self.adam, grads, self.rates.index_select(0, place)[0], place)
        return found.detach()


@cache
def compiler() -> Callable[[Callable], Callable]:
    """The compiler for one shape after another."""
    torch._dynamo.config.cache_size_limit = 64  # a Shape each
    return partial(torch.compile, dynamic=False, fullgraph=True)
