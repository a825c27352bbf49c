"""The partition: which past tokens share a state, in integers only.

The module has no tables and no tensors. The position of a token in log-linear attention follows from the bits of an
integer, and every other part (reference, kernels, decoding) calls the functions below by name.

Two views of the same tree. *Tokens* are 0-based. Token ``t`` sees token ``s <= t`` at ``level(t, s)``: level 0 is the
token itself, and level ``l >= 1`` is a bucket of ``2**(l-1)`` earlier tokens, present when bit ``l-1`` of ``t`` is set.
For 8 tokens the levels are

        s: 0  1  2  3  4  5  6  7
    t=0    0
    t=1    1  0
    t=2    2  2  0
    t=3    2  2  1  0
    t=4    3  3  3  3  0
    t=5    3  3  3  3  1  0
    t=6    3  3  3  3  2  2  0
    t=7    3  3  3  3  2  2  1  0

*Entries* are 1-based nodes of a Fenwick array over leaves (tokens or chunks): entry ``e`` covers the ``lowbit(e)``
leaves that end with leaf ``e - 1``. The buckets that leaf ``n`` sees are the entries on ``query_path(n)``; the entries
that contain leaf ``n`` are those on ``update_path(n)``.

Source: Guo et al. 2025, section 3.1; Fenwick 1994.
"""

from __future__ import annotations

from collections.abc import Iterator


def level(t: int, s: int) -> int:
    """Level at which token ``t`` sees token ``s`` (0 <= s <= t): the bit length of ``t XOR s``."""
    if not 0 <= s <= t:
        raise ValueError(f"s must satisfy 0 <= s <= t: got t={t}, s={s}")
    return (t ^ s).bit_length()


def num_levels(length: int) -> int:
    """Levels needed by ``length`` tokens (length >= 0): ``bit_length(length - 1) + 1``, and 1 for none."""
    if length < 0:
        raise ValueError(f"length must be >= 0: got {length}")
    return max(length - 1, 0).bit_length() + 1


def lowbit(e: int) -> int:
    """Number of leaves covered by entry ``e`` (e >= 1): its lowest set bit."""
    if e < 1:
        raise ValueError(f"e must be >= 1: got {e}")
    return e & -e


def bucket(e: int) -> range:
    """The 0-based leaves covered by entry ``e``: ``[e - lowbit(e), e)``."""
    return range(e - lowbit(e), e)


def query_path(n: int) -> Iterator[int]:
    """Entries that tile leaves ``[0, n)``, nearest (smallest) first. There are ``popcount(n)`` of them."""
    while n:
        yield n
        n -= lowbit(n)


def update_path(n: int, num_leaves: int) -> Iterator[int]:
    """Entries that contain leaf ``n``, smallest first, among the ``num_leaves`` entries of the array."""
    e = n + 1
    while e <= num_leaves:
        yield e
        e += lowbit(e)


def merges(e: int) -> Iterator[int]:
    """Entries folded into entry ``e`` when leaf ``e - 1`` arrives, nearest first: ``e - 2**m`` for 2**m < lowbit(e).

    This is the carry of a binary counter: the leaf itself, then buckets of 1, 2, 4, ... leaves, become one bucket.
    """
    step = 1
    while step < lowbit(e):
        yield e - step
        step *= 2


def aligned_blocks(start: int, stop: int) -> Iterator[range]:
    """The fewest nodes of the tree that tile leaves ``[start, stop)``: each 2**m leaves from a multiple of 2**m, in order."""
    while start < stop:
        size = 1 << (stop - start).bit_length() - 1
        if start:
            size = min(size, lowbit(start))
        yield range(start, start + size)
        start += size
