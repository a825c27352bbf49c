"""Scoring: exact match by the likeliest token at every place of the answer, given the answer's earlier tokens.

One forward pass per sample gives the result of greedy decoding. Greedy decoding writes the answer if and only if the
answer's first token is the likeliest after the question, its second the likeliest after the first, and so on. The
teacher-forced tokens differ from greedy ones only behind a token that has failed already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from loglinear.tasks.lm.evaluation import column_logits, share_error, to_device
from loglinear.tasks.niah.data import Sample


@dataclass(frozen=True)
class Score:
    """exact: the whole answer. at_depth: the value that stands at the sample's depth. loss: nats per token of the answer."""

    exact: bool
    at_depth: bool
    loss: float


def answer_logits(model: PreTrainedModel, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Logits ``[samples, columns, vocabulary]`` in float32 that predict the last ``columns`` tokens, and those tokens.

    All samples have one length; ``columns`` is the longest answer's. The output layer runs on these columns alone.
    """
    device = next(model.parameters()).device
    ids = to_device(torch.from_numpy(np.stack([sample.ids for sample in samples])), device)
    length = ids.shape[1]
    first = min(sample.answer_start for sample in samples)
    before = torch.arange(first - 1, length - 1, device=device)
    return column_logits(model, ids, before).float(), ids[:, first:]


@torch.inference_mode()
def score_samples(
    model: PreTrainedModel,
    samples: Iterable[Sample],
    batch_tokens: int,
    dtype: torch.dtype = torch.float32,
    on_batch: Callable[[int], None] | None = None,
) -> list[tuple[Sample, Score]]:
    """Score samples of any lengths. A batch holds samples of one length, about ``batch_tokens`` tokens: sort them by length.

    The model runs where its parameters are, under autocast if ``dtype`` is not float32. ``on_batch`` is called with the
    number of samples done. The ids of a sample are not kept: those of the result are empty.
    """
    model.eval()
    device = next(model.parameters()).device
    done: list[Sample] = []
    rows: list[tuple[Tensor, Tensor]] = []  # on the device, so that the host makes samples while the device computes
    for batch in _batches(samples, batch_tokens):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, targets = answer_logits(model, batch)
        right = logits.argmax(-1) == targets
        rows += zip(right, cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
        done += map(_without_ids, batch)
        if on_batch is not None:
            on_batch(len(done))
    return [
        (sample, _score(sample, right.cpu().numpy(), loss.cpu().numpy())) for sample, (right, loss) in zip(done, rows)
    ]


def _batches(samples: Iterable[Sample], batch_tokens: int) -> Iterator[list[Sample]]:
    for context, group in groupby(samples, lambda sample: len(sample.ids)):
        size, batch = max(1, batch_tokens // context), []
        for sample in group:
            batch.append(sample)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch


def _score(sample: Sample, right: np.ndarray, loss: np.ndarray) -> Score:
    """From the last columns of a sample: whether each token is the likeliest, and its loss."""
    first = len(sample.ids) - len(right)
    start, stop = (place - first for place in sample.spans[sample.placed])
    answer = slice(sample.answer_start - first, None)
    return Score(bool(right[answer].all()), bool(right[start:stop].all()), float(loss[answer].mean()))


def _without_ids(sample: Sample) -> Sample:
    shape = np.broadcast_to(np.int64(0), len(sample.ids))  # keeps the length, in eight bytes
    return Sample(shape, sample.spans, sample.kind, sample.depth, sample.placed, sample.key, sample.values)


def table(scored: Sequence[tuple[Sample, Score]]) -> list[dict]:
    """A row for every kind, length and depth: shares of samples, their standard errors, and the mean loss in nats.

    ``right`` has a number for each sample, in order: 1 for an exact answer, otherwise 0. Models are compared sample by sample.
    """
    cells: dict[tuple[str, int, float], list[Score]] = {}
    for sample, score in scored:
        cells.setdefault((sample.kind, len(sample.ids), sample.depth), []).append(score)
    return [
        {
            **{"kind": kind, "context": context, "depth": depth, "samples": len(scores)},
            "exact": (share := float(np.mean([score.exact for score in scores]))),
            "standard_error": share_error(share, len(scores)),
            "at_depth": float(np.mean([score.at_depth for score in scores])),
            "loss": float(np.mean([score.loss for score in scores])),
            "right": "".join("01"[score.exact] for score in scores),
        }
        for (kind, context, depth), scores in cells.items()
    ]


def by_context(rows: Sequence[dict]) -> list[dict]:
    """The rows of ``table`` averaged over depth: kind, context, samples, exact and its standard error."""
    cells: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        cells.setdefault((row["kind"], row["context"]), []).append(row)
    return [
        {
            **{"kind": kind, "context": context, "samples": (count := sum(row["samples"] for row in group))},
            "exact": (share := sum(row["exact"] * row["samples"] for row in group) / count),
            "standard_error": share_error(share, count),
        }
        for (kind, context), group in cells.items()
    ]
