"""The last repeat of a place in a genome, on either strand, and the loss by its distance.

A place counts if the ``ngram`` nucleotides before it occurred earlier in the sequence, as they are or, on the other strand, as
their reverse complement. On the other strand the known next nucleotide is the complement of the one before the earlier run.
"""

from __future__ import annotations

import numpy as np

from loglinear.tasks.lm.fasta import reverse_complement
from loglinear.tasks.lm.repeats import _mean, _ngram_codes, repeat_distances

NGRAM = 16  # 4^16 runs: few of 131,072 are equal by chance


def reverse_distances(ids: np.ndarray, ngram: int = NGRAM) -> tuple[np.ndarray, np.ndarray]:
    """As ``repeat_distances`` for runs on the other strand: distance ``[T - 1]``, 0 for none, and whether the token held.

    The distance of token t is that to the token before the earlier run, whose complement is the known one.
    """
    ids = np.asarray(ids, np.int64)
    length = len(ids)
    distances, held = np.zeros(max(length - 1, 0), np.int64), np.zeros(max(length - 1, 0), bool)
    count = length - ngram + 1
    if count < 2:
        return distances, held
    codes = _ngram_codes(np.concatenate([ids, reverse_complement(ids)]), ngram)
    ahead, back = (
        codes[:count],
        codes[length : length + count][::-1],
    )  # of the run at a, and of its place on the other strand
    starts = np.arange(1, count)  # of earlier runs with a token before them
    keys = np.sort(back[starts] * np.int64(length) + starts)
    later = np.arange(ngram, length - ngram)  # first tokens of runs that an earlier run does not overlap
    found = np.searchsorted(keys, ahead[later] * np.int64(length) + later - ngram, side="right") - 1
    nearest = keys[np.maximum(found, 0)]
    known = (found >= 0) & (nearest // length == ahead[later])
    tokens, befores = later[known] + ngram, nearest[known] % length - 1
    distances[tokens - 1] = tokens - befores
    complement = np.where(ids < 4, 3 - ids, ids)
    held[tokens - 1] = ids[tokens] == complement[befores]
    return distances, held


def by_strand(ids: np.ndarray, losses: np.ndarray, ngram: int = NGRAM) -> list[dict]:
    """Loss of ``losses [sequences, T - 1]`` in ranges of distance that double: of both strands, and of tokens without a repeat.

    Rows have ``strand`` ("same", "other" or "none"), ``first``, ``last``, and counts, losses and errors as ``by_distance``. A
    token with repeats on both strands belongs to the nearer one.
    """
    same, other = ([f(row, ngram) for row in ids] for f in (repeat_distances, reverse_distances))
    near, held = (np.stack([found[i] for found in same]) for i in (0, 1))
    far, held_far = (np.stack([found[i] for found in other]) for i in (0, 1))
    turned = (far > 0) & ((near == 0) | (far < near))
    rows = [{"strand": "none", "first": 0, "last": 0, **_mean("tokens", "loss", losses, (near == 0) & (far == 0))}]
    strands = ("same", near, held, (near > 0) & ~turned), ("other", far, held_far, turned)
    for name, distance, holds, chosen in strands:
        ranges = np.where(chosen, np.frexp(distance)[1], 0)
        for number in np.unique(ranges[chosen]):
            here, first = ranges == number, 1 << int(number) - 1
            row = {"strand": name, "first": first, "last": 2 * first - 1, **_mean("tokens", "loss", losses, here)}
            rows.append(row | _mean("repeated_tokens", "repeated_loss", losses, here & holds))
    return rows
