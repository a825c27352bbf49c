"""Kinds of associative recall, beside Zoology's (``data.draw``, here "first"): where pairs and queries lie, and what is asked.

    first          all pairs, then queries
    any            a pair and its query in any two slots of two tokens, the query after the pair
    end            queries in the last sixteenth, pairs before it
    tagged         as "end"; the first token of a pair tells the bucket that the pair lies in
    latest-newest  as "end", but each key is written four times with other values; the newest value is asked for
    latest-first   the same sequences; the value that was written first is asked for

In the last sixteenth of T tokens every query reads the same four large buckets, of T/2, T/4, T/8 and T/16 tokens. In "end" and
"tagged" each of them holds pairs in proportion to its size. For "tagged" the keys are four classes of equal size, one for each
bucket. Keys, values and all other tokens are drawn as in ``data.draw``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loglinear.tasks.mqar.data import Recall, check_sizes, distinct, draw

WRITES = 4  # of one key in "latest-newest" and "latest-first"
Draw = Callable[[int, int, int, int, torch.Generator], Recall]


def draw_any(rows: int, length: int, pairs: int, vocab_size: int, generator: torch.Generator) -> Recall:
    """As ``data.draw``, with each pair in a slot of its own and its query in a later one, all slots equally likely.

    Raises ValueError where the pairs and queries have no room, or the vocabulary too few keys.
    """
    check_sizes(length, pairs, vocab_size)
    keys, values = _keys_and_values(rows, pairs, vocab_size, generator)
    slots = _slots(length // 2, rows, 2 * pairs, generator).unflatten(1, (pairs, 2)).sort(-1).values
    return _sequences(length, vocab_size, keys, values, 2 * slots[..., 0], 2 * slots[..., 1], generator)


def draw_end(rows: int, length: int, pairs: int, vocab_size: int, generator: torch.Generator) -> Recall:
    """As ``data.draw``, with the queries of ``asked`` pairs in the last sixteenth and the pairs in four buckets before it.

    Raises ValueError as ``draw_any`` does, and for a length that is no power of two or is below 64.
    """
    return _draw_end(rows, length, pairs, vocab_size, generator, tagged=False)


def draw_tagged(rows: int, length: int, pairs: int, vocab_size: int, generator: torch.Generator) -> Recall:
    """As ``draw_end``, with keys of the class of their bucket; the classes are equal parts of the keys in their order."""
    return _draw_end(rows, length, pairs, vocab_size, generator, tagged=True)


def draw_newest(rows: int, length: int, pairs: int, vocab_size: int, generator: torch.Generator) -> Recall:
    """``pairs`` pairs of a quarter as many keys, anywhere before the last sixteenth; queries there want the newest values.

    Raises ValueError as ``draw_end`` does, and for pairs that are no multiple of four.
    """
    return _draw_latest(rows, length, pairs, vocab_size, generator, wanted=WRITES - 1)


def draw_first(rows: int, length: int, pairs: int, vocab_size: int, generator: torch.Generator) -> Recall:
    """The sequences of ``draw_newest``; the queries want the values that were written first."""
    return _draw_latest(rows, length, pairs, vocab_size, generator, wanted=0)


KINDS: dict[str, Draw] = {
    "first": draw,
    "any": draw_any,
    "end": draw_end,
    "tagged": draw_tagged,
    "latest-newest": draw_newest,
    "latest-first": draw_first,
}


def asked(kind: str, length: int, pairs: int) -> int:
    """Queries in a sequence of this kind."""
    if kind in ("first", "any"):
        return pairs
    return min(pairs if kind in ("end", "tagged") else pairs // WRITES, length // 32)


def bucket_shares(pairs: int) -> list[int]:
    """Pairs in each of the four large buckets, the largest first, in proportion 8 to 4 to 2 to 1; at least one in each."""
    counts = [max(1, round(pairs * part / 15)) for part in (4, 2, 1)]
    return [pairs - sum(counts), *counts]


def _draw_end(rows: int, length: int, pairs: int, vocab_size: int, generator: torch.Generator, tagged: bool) -> Recall:
    _check_end(length, pairs, vocab_size)
    shares = bucket_shares(pairs)
    keys, values = _keys_and_values(rows, pairs, vocab_size, generator)
    if tagged:
        kinds = (vocab_size // 2 - 1) // len(shares)
        if max(shares) > kinds:
            raise ValueError(f"vocab_size must give {max(shares)} keys to each of four classes: got {vocab_size}")
        parts = [1 + i * kinds + _slots(kinds, rows, count, generator) for i, count in enumerate(shares)]
        keys = torch.cat(parts, dim=1)
    sizes = [length // 4 >> i for i in range(len(shares))]  # slots of the buckets
    places = [_slots(size, rows, count, generator) for size, count in zip(sizes, shares)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    slots = torch.cat([place + start for place, start in zip(places, starts)], dim=1)
    wanted = _slots(pairs, rows, asked("end", length, pairs), generator)
    queries = _last_slots(wanted, length, generator)
    return _sequences(length, vocab_size, keys, values, 2 * slots, queries, generator, wanted)


def _draw_latest(
    rows: int, length: int, pairs: int, vocab_size: int, generator: torch.Generator, wanted: int
) -> Recall:
    _check_end(length, pairs, vocab_size)
    if pairs % WRITES:
        raise ValueError(f"pairs must be a multiple of {WRITES}, the times that a key is written: got {pairs}")
    keys, values = _keys_and_values(rows, pairs, vocab_size, generator)
    keys = keys[:, : pairs // WRITES].repeat_interleave(WRITES, dim=1)
    slots = _slots(length // 2 - length // 32, rows, pairs, generator).unflatten(1, (-1, WRITES)).sort(-1).values
    count = asked("latest-first", length, pairs)
    columns = (WRITES * torch.arange(count, device=keys.device) + wanted).expand(rows, -1)  # keys are in random order
    queries = _last_slots(columns, length, generator)
    return _sequences(length, vocab_size, keys, values, 2 * slots.flatten(1), queries, generator, columns)


def _sequences(
    length: int,
    vocab_size: int,
    keys: Tensor,
    values: Tensor,
    pairs: Tensor,
    queries: Tensor,
    generator: torch.Generator,
    wanted: Tensor | None = None,
) -> Recall:
    """Sequences with keys ``[rows, pairs]`` at positions ``pairs`` and values behind them, and with queries ``[rows, asked]``.

    wanted: ``[rows, asked]``, the pair that each query asks for; None is all in their order.
    """
    rows = len(keys)
    tokens = torch.randint(vocab_size, (rows, length), device=keys.device, generator=generator)
    tokens.scatter_(1, pairs, keys).scatter_(1, pairs + 1, values)
    if wanted is not None:
        keys, values, pairs = (x.gather(1, wanted) for x in (keys, values, pairs))
    tokens.scatter_(1, queries, keys)
    first = length * torch.arange(rows, device=keys.device)[:, None]
    return Recall(tokens, (queries + first).flatten(), values.flatten(), (pairs + first).flatten())


def _keys_and_values(rows: int, pairs: int, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    half = vocab_size // 2
    return 1 + _slots(half - 1, rows, pairs, generator), half + _slots(vocab_size - half, rows, pairs, generator)


def _slots(slots: int, rows: int, count: int, generator: torch.Generator) -> Tensor:
    """``[rows, count]`` distinct numbers below ``slots``, in random order."""
    return distinct(torch.ones(slots, device=generator.device), rows, count, generator)


def _last_slots(like: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Positions for queries ``[rows, asked]``: distinct slots of the last sixteenth."""
    rows, count = like.shape
    return length - length // 16 + 2 * _slots(length // 32, rows, count, generator)


def _check_end(length: int, pairs: int, vocab_size: int) -> None:
    check_sizes(length, pairs, vocab_size)
    if length < 64 or length & (length - 1):
        raise ValueError(f"length must be a power of two of at least 64, so that four buckets come last: got {length}")
    if pairs < 4:
        raise ValueError(f"pairs must be at least 4, one for each of four buckets: got {pairs}")
