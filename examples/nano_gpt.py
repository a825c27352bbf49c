"""A small GPT in the style of nanoGPT whose attention is a log-linear layer. It trains on the sources of Python itself.

    python examples/nano_gpt.py                       # log-linear
    python examples/nano_gpt.py --mixer attention     # the same model with softmax attention, to compare
    python examples/nano_gpt.py --device cuda --steps 2000 --width 384 --depth 6 --context 1024

The two models differ in the class ``Mixer`` and in the position embedding: a log-linear layer counts tokens itself.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.fenwick import num_levels
from loglinear.layers import LogLinearMamba2


@dataclass(frozen=True)
class Config:
    mixer: str = "log_linear"
    vocabulary: int = 256  # bytes
    context: int = 256
    width: int = 128
    heads: int = 4
    depth: int = 2


class SelfAttention(nn.Module):
    """The layer that the example replaces: causal softmax attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class LogLinear(nn.Module):
    """The replacement: the same shapes in and out, ``[batch, tokens, width]``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layer = LogLinearMamba2(
            hidden_size=config.width,
            num_heads=config.heads,
            head_dim=2 * config.width // config.heads,  # the inner width of Mamba-2 is twice the width of the model
            state_size=32,
            num_levels=num_levels(config.context),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.mixer = {"attention": SelfAttention, "log_linear": LogLinear}[config.mixer](config)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width) if config.mixer == "attention" else None
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def python_sources(size: int) -> Tensor:
    """The first ``size`` bytes of the standard library, as token ids."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    return torch.frombuffer(text[:size], dtype=torch.uint8).long()


def optimizer_of(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW whose weight decay spares vectors and the parameters that the layers name."""
    plain = {id(getattr(module, name)) for module in model.modules() for name in getattr(module, "no_weight_decay", ())}
    decayed = [p for p in model.parameters() if p.dim() > 1 and id(p) not in plain]
    others = [p for p in model.parameters() if p.dim() < 2 or id(p) in plain]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def main(arguments: list[str] | None = None) -> list[float]:
    """Train and print. Returns the loss of every step, in nats per byte."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixer", choices=("log_linear", "attention"), default="log_linear")
    parser.add_argument("--context", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    config = Config(options.mixer, context=options.context, width=options.width, depth=options.depth)
    model, text = GPT(config).to(options.device), python_sources(2_000_000)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes of text")
    optimizer, losses, start = optimizer_of(model, learning_rate=3e-3), [], time.perf_counter()
    for step in range(options.steps):
        starts = torch.randint(len(text) - config.context, (options.batch,))
        rows = torch.stack([text[i : i + config.context + 1] for i in starts.tolist()]).to(options.device)
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == options.steps - 1:
            bits = losses[-1] / math.log(2)
            print(f"step {step:4}: loss {losses[-1]:.3f}, {bits:.2f} bits a byte, {time.perf_counter() - start:.0f} s")
    return losses


if __name__ == "__main__":
    main()
