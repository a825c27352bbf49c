"""The partition, exhaustively to 4,096 tokens: against a binary counter made of lists, and against the drawn picture."""

import itertools
import re

import pytest

from loglinear import fenwick
from oracle import levels_seen

SIZE = 4096


@pytest.fixture(scope="module")
def counter():
    """Before each token: the buckets of a binary counter, oldest first, as ranges; and the carries its arrival makes."""
    buckets, history = [], []
    for leaf in range(SIZE + 1):
        before, carried = list(buckets), []
        buckets.append(range(leaf, leaf + 1))
        while len(buckets) > 1 and len(buckets[-2]) == len(buckets[-1]):
            right, left = buckets.pop(), buckets.pop()
            carried.append(left)
            buckets.append(range(left.start, right.stop))
        history.append((before, carried))
    return history


def test_levels_are_the_drawn_picture():
    rows = re.findall(r"t=(\d+) +([\d ]+)", fenwick.__doc__)
    drawn = {int(t): [int(x) for x in levels.split()] for t, levels in rows}
    assert sorted(drawn) == list(range(8))
    assert drawn == {t: [fenwick.level(t, s) for s in range(t + 1)] for t in range(8)}


def test_every_level_of_every_pair():
    for t in range(SIZE):
        assert [fenwick.level(t, s) for s in range(t + 1)] == levels_seen(t), t


def test_num_levels_is_what_the_tokens_use():
    most = -1
    for t in range(SIZE):
        assert fenwick.num_levels(t) == max(most, 0) + 1, t
        most = max(most, *levels_seen(t))


def test_query_path_is_the_counter_and_names_the_level(counter):
    for n, (buckets, _) in enumerate(counter):
        path = list(fenwick.query_path(n))
        assert [fenwick.bucket(e) for e in path] == buckets[::-1], n
        assert len(path) == n.bit_count()
        seen = [fenwick.lowbit(e).bit_length() for e in reversed(path) for _ in fenwick.bucket(e)]
        assert [*seen, 0] == levels_seen(n), n


def test_merges_are_the_carries(counter):
    for leaf, (_, carried) in enumerate(counter[:-1]):
        assert [fenwick.bucket(e) for e in fenwick.merges(leaf + 1)] == carried, leaf
        parts = [*(leaf for e in fenwick.merges(leaf + 1) for leaf in fenwick.bucket(e)), leaf]
        assert sorted(parts) == list(fenwick.bucket(leaf + 1))


def test_update_path_is_every_entry_that_contains_the_leaf():
    containing = [[] for _ in range(SIZE)]
    for e in range(1, SIZE + 1):
        for leaf in fenwick.bucket(e):
            containing[leaf].append(e)
    for leaf, entries in enumerate(containing):
        assert list(fenwick.update_path(leaf, SIZE)) == entries, leaf
    for size in range(70):  # arrays of any size, powers of two or not
        for leaf in range(size):
            assert list(fenwick.update_path(leaf, size)) == [e for e in containing[leaf] if e <= size]


def test_query_and_update_meet_in_exactly_one_entry():
    """Chunk n reads leaf s once: the paths of a later query and of an earlier write share one entry, and no other pair does."""
    size = 130
    for n in range(size):
        read = set(fenwick.query_path(n))
        for s in range(size):
            assert len(read & set(fenwick.update_path(s, size))) == (1 if s < n else 0), (n, s)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fenwick.level(3, 4), "s must.*t=3, s=4"),
        (lambda: fenwick.level(3, -1), "s must.*t=3, s=-1"),
        (lambda: fenwick.num_levels(-1), "length must.*got -1"),
        (lambda: fenwick.lowbit(0), "e must.*got 0"),
    ],
)
def test_what_is_no_position_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_aligned_blocks_are_the_fewest_nodes_that_tile_a_range():
    for start in range(40):
        for stop in range(start, 40):
            blocks = list(fenwick.aligned_blocks(start, stop))
            assert [leaf for block in blocks for leaf in block] == list(range(start, stop))
            for block in blocks:
                size = len(block)
                assert size & (size - 1) == 0
                assert block.start % size == 0
            for left, right in itertools.pairwise(blocks):  # no two are halves of a node
                assert len(left) != len(right) or left.start % (2 * len(left))
