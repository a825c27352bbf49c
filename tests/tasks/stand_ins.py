"""Models that are known to be right or wrong: what a score must say about them needs no training."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn


class StandIn(nn.Module):
    """A causal model whose logits are ``rule(ids)``: for each ``[T]`` the token it predicts next at every place."""

    def __init__(self, vocab_size: int, rule):
        super().__init__()
        self.vocab_size, self.rule = vocab_size, rule
        self.anchor = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, input_ids, use_cache, logits_to_keep):
        self.seen.append(tuple(input_ids.shape))
        predicted = torch.stack([self.rule(row) for row in input_ids])[:, logits_to_keep]
        return SimpleNamespace(logits=nn.functional.one_hot(predicted, self.vocab_size).float())


def copy_after_match(ids: torch.Tensor, ngram: int = 3) -> torch.Tensor:
    """What followed the last earlier occurrence of the last ``ngram`` tokens; token 0 if there was none."""
    predicted, last = torch.zeros_like(ids), {}
    for t in range(ngram - 1, len(ids)):
        key = tuple(ids[t - ngram + 1 : t + 1].tolist())
        if key in last:
            predicted[t] = ids[last[key] + 1]
        last[key] = t
    return predicted
