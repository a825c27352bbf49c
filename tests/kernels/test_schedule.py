"""The bits by which kernels know the tree: the schedule of chunk_grads and counts of set bits, against the partition itself."""

from __future__ import annotations

from loglinear.fenwick import level, query_path
from loglinear.kernels.decay import chunk_grads
from loglinear.kernels.tree.place import GROUP, set_bits


def test_every_chunk_receives_each_later_chunk_once_at_its_level():
    size = GROUP.value
    base, seen, complete = set(), set(), {size - 1: set()}
    for step in range(chunk_grads.STEPS.value):
        if step == chunk_grads.REBASE.value:
            base = seen
        if chunk_grads.RESTARTS.value >> step & 1:
            seen = base
        chunk = chunk_grads.CHUNKS.value >> (4 * step) & 15
        seen = seen | {(chunk, chunk_grads.LEVELS.value >> (4 * step) & 15)}
        if chunk_grads.STORES.value >> step & 1:
            assert chunk - 1 not in complete
            complete[chunk - 1] = seen
    assert complete == {c: {(n, level(n, c) - 1) for n in range(c + 1, size)} for c in range(size)}


def test_set_bits_are_the_entries_of_a_query_path():
    """The kernel's function is arithmetic alone, so that it counts Python's numbers too."""
    for n in (*range(1, 1 << 10), (1 << 24) - 1, 0xA5A5A5, 1 << 23):
        assert set_bits.fn(n) == len(list(query_path(n)))
