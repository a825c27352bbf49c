"""Training on documents of different lengths, packed into one row without padding.

    python examples/packed_training.py

First it compares a packed row with the same documents in rows of their own: loss and gradients are equal. Then it trains on
packed rows. ``cu_seqlens`` names the borders, and no document sees another.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from loglinear import LogLinearConfig, LogLinearForCausalLM


def documents() -> Iterator[Tensor]:
    """Each source file of the standard library as bytes, at most 600 of them. Starts again after the last file."""
    while True:
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            if text := path.read_bytes()[:600]:
                yield torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def pack(texts: list[Tensor]) -> dict[str, Tensor]:
    """One row with all documents behind each other, and their offsets ``[n + 1]``."""
    row = torch.cat(texts).unsqueeze(0)
    offsets = torch.tensor([0, *(len(text) for text in texts)]).cumsum(0)
    return {"input_ids": row, "labels": row, "cu_seqlens": offsets}


def pad(texts: list[Tensor]) -> dict[str, Tensor]:
    """A row for each document, padded on the right. A label of -100 is no target."""
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def gradients(model: LogLinearForCausalLM, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """The loss of a batch, and its gradients in one vector."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def take(source: Iterator[Tensor], tokens: int) -> list[Tensor]:
    """Whole documents that together have about ``tokens`` tokens."""
    taken: list[Tensor] = []
    while sum(map(len, taken)) < tokens:
        taken.append(next(source))
    return taken


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Compare, train and print. Returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a packed row, about")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    config = LogLinearConfig(
        mixer="log_linear_gated_deltanet",
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        max_position_embeddings=1024,
    )
    model, source = LogLinearForCausalLM(config).train(), documents()

    texts = [*take(source, options.tokens), torch.tensor(list(b"import this\n"))]
    packed, padded = pack(texts), pad(texts)
    packed_loss, packed_gradients = gradients(model, packed)
    padded_loss, padded_gradients = gradients(model, padded)
    error = ((packed_gradients - padded_gradients).norm() / padded_gradients.norm()).item()
    sizes = packed["input_ids"].numel(), padded["input_ids"].numel()
    print(f"{len(texts)} documents: {sizes[0]:,} tokens packed, {sizes[1]:,} padded")
    print(f"loss {packed_loss:.6f} packed, {padded_loss:.6f} in rows of their own; gradients differ by {error:.0e}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(options.steps):
        loss = model(**pack(take(source, options.tokens))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step:3}: loss {losses[-1]:.3f}")
    return {"packed": packed_loss, "padded": padded_loss, "error": error, "first": losses[0], "last": losses[-1]}


if __name__ == "__main__":
    main()
