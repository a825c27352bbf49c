"""Evaluation: the loss of every predicted token, kept by position, because a model with a longer memory shows there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from loglinear.models import LogLinearForCausalLM
from loglinear.tasks.lm.tokens import Windows

# Positions whose logits are computed at once: 131,072 positions x 32,000 tokens would fill 16 GiB.
TOKENS_PER_HEAD_CALL = 4096


@torch.inference_mode()
def position_losses(
    model: PreTrainedModel,
    windows: Windows,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    on_batch: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Cross-entropy in nats of every prediction: float32 ``[sequences, context - 1]``.

    Column ``p`` is the prediction of token ``p + 1`` from tokens ``0 .. p``. The model runs where its parameters are,
    under autocast if ``dtype`` is not float32. ``on_batch`` is called with the number of sequences done.
    """
    model.eval()
    device = next(model.parameters()).device
    losses = np.empty((len(windows), windows.context - 1), np.float32)
    for start in range(0, len(windows), batch_size):
        stop = min(start + batch_size, len(windows))
        ids = to_device(torch.stack([windows[index]["input_ids"] for index in range(start, stop)]), device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if isinstance(model, LogLinearForCausalLM):
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                head = model.get_output_embeddings()
            else:  # other models may do more between hidden states and logits
                hidden, head = model(input_ids=ids, use_cache=False).logits, torch.nn.Identity()
            losses[start:stop] = _token_losses(head, hidden, ids).cpu().numpy()
        if on_batch is not None:
            on_batch(stop)
    return losses


def column_logits(model: PreTrainedModel, ids: Tensor, columns: Tensor) -> Tensor:
    """Logits ``[B, len(columns), vocabulary]`` behind some columns of ids ``[B, T]``. No other logits are ever in memory."""
    return model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on ``device``. The host does not wait for a GPU to fetch it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _token_losses(head: torch.nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
    states, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    pieces = [
        cross_entropy(head(states_piece).float(), targets_piece, reduction="none")
        for states_piece, targets_piece in zip(states.split(TOKENS_PER_HEAD_CALL), targets.split(TOKENS_PER_HEAD_CALL))
    ]
    return torch.cat(pieces).view(len(ids), -1)


@dataclass(frozen=True)
class Mean:
    """A mean over sequences and its standard error (0 for one sequence), both in nats per token."""

    value: float
    standard_error: float

    @classmethod
    def over_sequences(cls, losses: np.ndarray) -> Mean:
        """The mean of ``[sequences, positions]``. Sequences are the independent samples; tokens of one text are not."""
        means = losses.mean(axis=1, dtype=np.float64)
        error = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else 0.0
        return cls(float(means.mean()), float(error))


def share_error(share: float, count: int) -> float:
    """Standard error of a share of ``count`` samples. One hit and one miss more keep it above 0 where all samples agree."""
    smoothed = (share * count + 1) / (count + 2)
    return math.sqrt(smoothed * (1 - smoothed) / count)


def by_position(losses: np.ndarray, buckets: int = 32) -> list[dict]:
    """``losses`` ``[sequences, positions]`` averaged in ``buckets`` equal ranges of positions (fewer if there are fewer).

    Each row: ``first`` and ``last`` (positions, inclusive, 0-based), ``loss`` and ``standard_error`` in nats.
    """
    rows = []
    for first, stop in pairwise(_edges(losses.shape[1], buckets)):
        mean = Mean.over_sequences(losses[:, first:stop])
        row = {"first": int(first), "last": int(stop) - 1, "loss": mean.value, "standard_error": mean.standard_error}
        rows.append(row)
    return rows


def summary(losses: np.ndarray, buckets: int = 32) -> dict:
    """Loss, perplexity, the curve by position and the losses of single sequences, ready for JSON."""
    mean = Mean.over_sequences(losses)
    return {
        "sequences": losses.shape[0],
        "predictions": losses.size,
        "loss": mean.value,
        "standard_error": mean.standard_error,
        "perplexity": math.exp(mean.value),
        "by_position": by_position(losses, buckets),
        "per_sequence": per_sequence(losses),
    }


def per_sequence(losses: np.ndarray, buckets: int = 16) -> dict:
    """Mean losses of single sequences in ``buckets`` ranges of positions, rounded to 1e-5 nats.

    Sequences differ from each other by far more than two models differ on one sequence. These numbers let models be compared
    sequence by sequence. ``edges``: bucket ``i`` holds the positions ``edges[i] .. edges[i + 1] - 1``. ``losses``:
    ``[sequences][buckets]``.
    """
    edges = _edges(losses.shape[1], buckets)
    means = np.add.reduceat(losses.astype(np.float64), edges[:-1], axis=1) / np.diff(edges)
    return {"edges": edges.tolist(), "losses": means.round(5).tolist()}


def _edges(positions: int, buckets: int) -> np.ndarray:
    return np.linspace(0, positions, min(buckets, positions) + 1).round().astype(int)
