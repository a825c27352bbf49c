"""What kernels know of the tree against the partition itself: schedules, masks of units, counts of bits, chunks."""

from __future__ import annotations

from itertools import product

from loglinear.fenwick import bucket, level, query_path
from loglinear.kernels.decay import chunk_grads
from loglinear.kernels.delta import octet_grads, octet_maps, path_queries
from loglinear.kernels.tree.place import OCTET, set_bits
from loglinear.kernels.tree.problem import kernel_chunks
from loglinear.kernels.tuning import delta_rule_config, scalar_gate_config
from loglinear.state import CHUNK_SIZE, FLOATS


def test_every_chunk_receives_each_later_chunk_once_at_its_level():
    size = OCTET.value
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


def test_the_map_before_a_unit_is_an_entry_or_a_kept_prefix():
    """A group's units are leaves 0 to OCTET - 1: a prefix is ``[0, c)``; a pair is an entry that begins later."""
    size = OCTET.value
    entries = [bucket(e) for e in range(1, size + 1)]
    pairs = [entry for entry in entries if entry.start > 0 and len(entry) > 1]
    assert pairs == [range(octet_maps.FIRST_PAIRED.value, octet_maps.FIRST_PAIRED.value + 2)]
    prefixes = [c for c in range(1, size) if range(c) not in entries]
    after_entry = {c for c in range(1, size) if range(c) in entries} | {pairs[0][1]}
    assert {c for c in range(size) if octet_maps.AFTER_PREFIX.value >> c & 1} == set(prefixes)
    assert {c for c in range(size) if octet_maps.AFTER_ENTRY.value >> c & 1} == after_entry
    assert octet_maps.PREFIXES.value == octet_grads.SPARE.value == len(prefixes)


def test_entries_within_a_group_are_counted():
    inner = [e for n in range(OCTET.value) for e in query_path(OCTET.value + n) if e > OCTET.value]
    assert path_queries.IN_OCTET.value == len(inner)


def test_set_bits_are_the_entries_of_a_query_path():
    """The kernel's function is arithmetic alone, so that it counts Python's numbers too."""
    for n in (*range(1, 1 << 10), (1 << 24) - 1, 0xA5A5A5, 1 << 23):
        assert set_bits.fn(n) == len(list(query_path(n)))


def test_every_chunk_is_a_part_of_a_states_chunk():
    for dtype, K, V in product(FLOATS[1:], (8, 64, 128, 256), (16, 64, 128, 1024)):
        small = scalar_gate_config(dtype, K, V, 1 << 16)
        for config in (scalar_gate_config(dtype, K, V), small, delta_rule_config(dtype, K, V)):
            assert kernel_chunks(config.chunk) * config.chunk == CHUNK_SIZE
