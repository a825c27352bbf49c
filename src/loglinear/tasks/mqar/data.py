"""Sequences of multi-query associative recall, drawn on any device and without loops over sequences.

    key value key value key value | query  filler filler filler query filler query filler
    position 0 .. 2·pairs - 1       slot 0        slot 1        slot 2       slot 3

The data follow the definition of Zoology (Arora et al. 2023, appendix on synthetics), with one difference: training sequences
never repeat, because every block of batches is drawn from a seed of its own. Keys are distinct and come from the first half of
the vocabulary without token 0. Values are distinct and come from the second half. A query repeats a key and asks for its
value; the value itself is not shown. Each key is asked for once, in a slot of two tokens. Slot s is chosen with
probability proportional to (s + 1)^(a - 1). All other tokens are uniform over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

POWER = 0.01  # the exponent a of Zoology; 1 would be uniform
ROWS_AT_ONCE = 16_384  # sequences drawn at once: each takes a number per vocabulary entry, 64 MiB at 2,048 entries


@dataclass(frozen=True)
class Recall:
    """Sequences with their queries and answers.

    Attributes:
        tokens: int64 ``[..., rows, T]``.
        queries: int64 ``[..., asked]``, the positions of queries, counted through the rows (row · T + position).
        answers: int64 ``[..., asked]``, the value that belongs to each.
        sources: int64 ``[..., asked]``, the position of the pair that has it (of its key), counted like queries.
    """

    tokens: Tensor
    queries: Tensor
    answers: Tensor
    sources: Tensor

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.tokens, self.queries, self.answers, self.sources

    def batch(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, queries and answers of the i-th of several batches."""
        return self.tokens[i], self.queries[i], self.answers[i]


def check_sizes(length: int, pairs: int, vocab_size: int) -> None:
    """Raise ValueError if a sequence has no room for the pairs and their queries, or the vocabulary has too few keys."""
    if pairs < 1 or 4 * pairs > length:
        raise ValueError(f"pairs must be 1 to a quarter of the length {length}, two tokens each way: got {pairs}")
    if pairs > vocab_size // 2 - 1:
        raise ValueError(f"vocab_size must be at least {2 * pairs + 2} for {pairs} distinct keys: got {vocab_size}")


def check_batches(rows: int, length: int, mixture: tuple[int, ...], vocab_size: int) -> None:
    """Raise ValueError where batches of ``rows`` sequences cannot hold equal shares of each number of pairs."""
    for pairs in mixture:
        check_sizes(length, pairs, vocab_size)
    if rows < 1 or rows % len(mixture):
        raise ValueError(
            f"a batch must hold a multiple of {len(mixture)} sequences, one for each number of pairs: got {rows}"
        )


def slot_probabilities(length: int, pairs: int, device: torch.device | str = "cpu") -> Tensor:
    """float32 ``[slots]``: the power law over the slots of two tokens that follow the pairs."""
    slots = torch.arange(1, (length - 2 * pairs) // 2 + 1, device=device, dtype=torch.float32)
    weights = slots ** (POWER - 1)
    return weights / weights.sum()


def draw(rows: int, length: int, pairs: int, vocab_size: int, generator: torch.Generator) -> Recall:
    """``rows`` sequences of T = ``length`` tokens with ``pairs`` pairs each, on the generator's device.

    Raises ValueError as ``check_sizes`` does.
    """
    check_sizes(length, pairs, vocab_size)
    device, half = generator.device, vocab_size // 2
    keys = 1 + distinct(torch.ones(half - 1, device=device), rows, pairs, generator)
    values = half + distinct(torch.ones(vocab_size - half, device=device), rows, pairs, generator)
    positions = 2 * pairs + 2 * distinct(slot_probabilities(length, pairs, device), rows, pairs, generator)
    tokens = torch.randint(vocab_size, (rows, length), device=device, generator=generator)
    tokens[:, : 2 * pairs] = torch.stack([keys, values], dim=2).flatten(1)
    tokens.scatter_(1, positions, keys)
    first = length * torch.arange(rows, device=device)[:, None]
    sources = first + 2 * torch.arange(pairs, device=device)
    return Recall(tokens, (positions + first).flatten(), values.flatten(), sources.flatten())


def distinct(weights: Tensor, rows: int, count: int, generator: torch.Generator) -> Tensor:
    """``[rows, count]`` indices into ``weights``, drawn one after the other without replacement in each row.

    The smallest of exponential times with these rates come in exactly that order and with exactly these probabilities.
    """
    drawn = []
    for start in range(0, rows, ROWS_AT_ONCE):
        size = (min(ROWS_AT_ONCE, rows - start), len(weights))
        times = torch.empty(size, device=weights.device).exponential_(generator=generator) / weights
        drawn.append(times.topk(count, dim=1, largest=False, sorted=True).indices)
    return torch.cat(drawn)


def draw_batches(
    batches: int,
    rows: int,
    length: int,
    mixture: tuple[int, ...],
    vocab_size: int,
    generator: torch.Generator,
    apart_from: Tensor | None = None,
    draw: Callable[[int, int, int, int, torch.Generator], Recall] = draw,
) -> Recall:
    """``batches`` batches of ``rows`` sequences; the same share of each batch has each number of pairs in ``mixture``.

    Args:
        rows: a multiple of the length of ``mixture``; the first rows have the first number of pairs.
        apart_from: ``fingerprints`` of sequences that must not be drawn. A sequence with such a fingerprint is drawn again.
        draw: the kind of recall (``kinds.KINDS``).

    Raises:
        ValueError: sizes do not fit, or so few sequences exist that none apart from those are found.
    """
    check_batches(rows, length, mixture, vocab_size)
    share = rows // len(mixture)
    parts = []
    for i, pairs in enumerate(mixture):
        part = _draw_apart(batches * share, length, pairs, vocab_size, generator, apart_from, draw)
        row = torch.arange(batches * share, device=generator.device)[:, None]
        shift = length * (i * share + row % share - row)  # from rows of the part to those of a batch
        queries, sources = (x.view(len(row), -1) + shift for x in (part.queries, part.sources))
        asked = [x.reshape(batches, -1) for x in (queries, part.answers, sources)]
        parts.append([part.tokens.view(batches, share, length), *asked])
    return Recall(*(torch.cat(column, dim=1) for column in zip(*parts)))


def fingerprints(tokens: Tensor) -> Tensor:
    """int64 ``[rows]`` for tokens ``[rows, T]``. Equal rows have equal numbers; other rows have them with a chance of 2^-64."""
    mixing = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (tokens.shape[1],), generator=mixing).to(tokens.device)
    return (tokens * factors).sum(1)  # modulo 2^64


def _draw_apart(
    rows: int,
    length: int,
    pairs: int,
    vocab_size: int,
    generator: torch.Generator,
    apart_from: Tensor | None,
    draw: Callable[[int, int, int, int, torch.Generator], Recall],
) -> Recall:
    drawn = draw(rows, length, pairs, vocab_size, generator)
    if apart_from is None:
        return drawn
    queries, answers, sources = (x.view(rows, -1) for x in drawn.parts()[1:])
    for _ in range(100):
        again = torch.isin(fingerprints(drawn.tokens), apart_from).nonzero().squeeze(1)
        if not len(again):
            return drawn
        other = draw(len(again), length, pairs, vocab_size, generator)
        shift = length * (again - torch.arange(len(again), device=again.device))[:, None]
        drawn.tokens[again] = other.tokens
        queries[again] = other.queries.view(len(again), -1) + shift
        answers[again] = other.answers.view(len(again), -1)
        sources[again] = other.sources.view(len(again), -1) + shift
    raise ValueError(f"vocab_size: {vocab_size} is too small to draw training sequences apart from the held-out ones")
