"""The schedule by which chunk_grads walks a group's tree, against the partition itself."""

from __future__ import annotations

from loglinear.fenwick import level
from loglinear.kernels.decay import chunk_grads
from loglinear.kernels.tree.place import GROUP


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
