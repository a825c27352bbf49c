"""By trace: what the tensors are told to read, fold and keep equals fenwick's integers, one by one.

Chunks and entries are named (sequence, n) and (sequence, e) by enumeration, which is all that is assumed of the layout.
"""

import pytest
import torch

from loglinear import fenwick, reference
from loglinear.reference.layout import build_layout
from oracle import make_inputs

C = 8
CASES = {
    "one row": ((1000,), (0,)),
    "short and empty rows": ((0, 1, 7, 8, 9, 0), (0,) * 6),
    "exactly full chunks": ((64, 64, 64), (0, 0, 0)),
    "rows that continue": ((100, 3, 0, 17, 1, 1, 64, 0), (0, 37, 64, 7, 1000, 63, 64, 65)),
    "one token each": ((1,) * 70, tuple(range(70))),
    "nothing at all": ((), ()),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def traced(request):
    """The layout, its sequences (length, position), the chunks by list index, and the entries by list index."""
    lengths, positions = request.param
    slots = max((position // C).bit_length() for position in (*positions, 0))
    layout = build_layout(lengths, positions, slots, C, torch.device("cpu"))
    chunks, entries = [], {}
    for row, (length, position) in enumerate(zip(lengths, positions)):
        for n in range(position // C, -(-(position + length) // C)):
            entries[len(chunks)] = (row, n + 1)
            chunks.append((row, n))
    for row, position in enumerate(positions):
        for slot in range(slots):  # slot m of a state holds the bucket of 2**m chunks on the path of its open chunk
            entries[max(len(chunks), 1) + row * slots + slot] = (row, position // C >> slot << slot)
    return layout, list(zip(lengths, positions)), chunks, entries


def collect(tables):
    """Per left index, its right indices in the order of the levels."""
    found = {}
    for left, right in tables:
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            found.setdefault(a, []).append(b)
    return found


def test_every_token_lies_in_its_chunk(traced):
    layout, sequences, chunks, _ = traced
    position_of = {(row, n): i * C for i, (row, n) in enumerate(chunks)}
    new = [(row, start + i) for row, (length, start) in enumerate(sequences) for i in range(length)]
    old = [(row, t) for row, (_, start) in enumerate(sequences) for t in range(start // C * C, start)]
    assert layout.place.tolist() == [position_of[row, t // C] + t % C for row, t in new]
    assert layout.open_place.tolist() == [position_of[row, t // C] + t % C for row, t in old]
    assert layout.open_from.tolist() == [row * C + t % C for row, t in old]
    assert layout.regular == (layout.place.tolist() == list(range(layout.num_chunks * C)))


def test_each_chunk_reads_its_query_path(traced):
    layout, _, chunks, entries = traced
    reads = collect(layout.reads)
    for index, (row, n) in enumerate(chunks):
        assert [entries[i] for i in reads.pop(index, [])] == [(row, e) for e in fenwick.query_path(n)], (row, n)
    assert not reads
    for m, (_, entry) in enumerate(layout.reads):  # the level a table is read at is the level of its buckets
        assert all(fenwick.lowbit(entries[i][1]) == 1 << m for i in entry.tolist())


def test_each_closed_entry_folds_in_its_merges(traced):
    layout, sequences, chunks, entries = traced
    folds = collect(layout.builds)
    for index, (row, n) in enumerate(chunks):
        length, start = sequences[row]
        closed = (n + 1) * C <= start + length
        merged = [(row, e) for e in fenwick.merges(n + 1)] if closed else []
        assert [entries[i] for i in folds.pop(index, [])] == merged, (row, n)
    assert not folds
    for m, (_, earlier) in enumerate(layout.builds):  # level by level, so that what is folded in is itself complete
        assert all(fenwick.lowbit(entries[i][1]) == 1 << m for i in earlier.tolist())


def test_the_final_state_is_the_path_of_the_open_chunk(traced):
    layout, sequences, chunks, entries = traced
    kept = collect(layout.final_reads)
    assert layout.position.tolist() == [sum(pair) for pair in sequences]
    for row, end in enumerate(layout.position.tolist()):
        assert [entries[i] for i in kept.pop(row, [])] == [(row, e) for e in fenwick.query_path(end // C)], row
        assert layout.open_live[row].tolist() == [i < end % C for i in range(C)]
        if end % C:
            assert chunks[layout.open_chunk[row]] == (row, end // C)
        assert layout.num_slots >= (end // C).bit_length()
    assert not kept


def test_the_recurrent_form_merges_when_the_counter_carries():
    T, heard = 300, []
    x = make_inputs(B=1, T=T, H=1, G=1, K=1, V=1, gate="scalar")
    q, k, v, scales, g = (x[name].transpose(1, 2) for name in ("q", "k", "v", "level_scales", "g"))
    reference.recurrent(q, k, v, reference.Scalar(g), scales, on_merge=lambda e, into: heard.append((e, into)))
    assert heard == [(e, into) for into in range(1, T + 1) for e in fenwick.merges(into)]
    assert len(heard) == T - T.bit_count()  # every leaf but the live buckets has been merged away once
