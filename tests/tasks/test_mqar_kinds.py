"""Kinds of associative recall against their definition: places, classes of keys, newest and first values."""

from __future__ import annotations

import pytest
import torch

from loglinear.fenwick import level
from loglinear.tasks.mqar.data import draw_batches
from loglinear.tasks.mqar.kinds import KINDS, WRITES, asked, bucket_shares

pytestmark = pytest.mark.default_packages
LENGTH, PAIRS, VOCABULARY, ROWS = 128, 16, 256, 60
LATE = sorted(set(KINDS) - {"first", "any"})


def drawn(kind, seed=1):
    recall = KINDS[kind](ROWS, LENGTH, PAIRS, VOCABULARY, torch.Generator().manual_seed(seed))
    count = asked(kind, LENGTH, PAIRS)
    queries, answers, sources = (x.view(ROWS, count) for x in recall.parts()[1:])
    rows = torch.arange(ROWS)[:, None]
    assert torch.equal(queries // LENGTH, rows.expand_as(queries))
    assert torch.equal(sources // LENGTH, rows.expand_as(sources))
    return recall.tokens, queries % LENGTH, answers, sources % LENGTH


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_repeats_the_key_of_its_source_and_wants_the_value_behind_it(kind):
    tokens, queries, answers, sources = drawn(kind)
    assert torch.equal(tokens.gather(1, queries), tokens.gather(1, sources))
    assert torch.equal(tokens.gather(1, sources + 1), answers)
    assert (sources < queries).all()
    assert (queries.sort(1).values.diff(dim=1) > 1).all()  # no two in one slot


def test_any_spreads_pairs_and_queries_over_all_slots():
    _, queries, _, sources = drawn("any")
    # The earlier and the later of two numbers uniform in 64 slots: a third and two thirds of 128 tokens, within 3.
    assert abs(float(sources.double().mean()) - 42) < 3
    assert abs(float(queries.double().mean()) - 84) < 3


@pytest.mark.parametrize("kind", LATE)
def test_late_queries_read_their_pairs_from_four_large_buckets(kind):
    _, queries, _, sources = drawn(kind)
    assert int(queries.min()) >= LENGTH - LENGTH // 16
    levels = {level(t, s) for t, s in zip(queries.flatten().tolist(), sources.flatten().tolist())}
    assert levels <= {4, 5, 6, 7}
    assert levels == {4, 5, 6, 7} or kind.startswith("latest")


def test_buckets_hold_pairs_in_proportion_and_none_is_empty():
    assert [bucket_shares(pairs) for pairs in (4, 32, 64, 128)] == [
        [1, 1, 1, 1],
        [17, 9, 4, 2],
        [34, 17, 9, 4],
        [68, 34, 17, 9],
    ]


def test_a_tag_tells_the_bucket():
    tokens, queries, _, sources = drawn("tagged")
    classes = (tokens.gather(1, sources) - 1) // ((VOCABULARY // 2 - 1) // 4)
    for key_class, t, s in zip(classes.flatten().tolist(), queries.flatten().tolist(), sources.flatten().tolist()):
        assert level(t, s) == 7 - key_class


@pytest.mark.parametrize(("kind", "place"), [("latest-newest", WRITES - 1), ("latest-first", 0)])
def test_a_key_is_written_four_times_and_the_wanted_value_is_the_newest_or_the_first(kind, place):
    tokens, queries, _, sources = drawn(kind)
    found = 0
    for row in range(ROWS):
        for query, source in zip(queries[row].tolist(), sources[row].tolist()):
            key = tokens[row, query]
            # Slots begin at even positions; other tokens may repeat a key by chance, values of slots are never keys.
            slots = [s for s in range(0, LENGTH - LENGTH // 16, 2) if tokens[row, s] == key]
            if len(slots) == WRITES:  # no chance repeats
                assert slots[place] == source
                found += 1
    assert found > 100


def test_both_of_latest_have_the_same_sequences():
    newest, first = (drawn(kind)[0] for kind in ("latest-newest", "latest-first"))
    assert torch.equal(newest, first)


def test_batches_of_a_kind_point_into_themselves():
    batch = draw_batches(3, 6, LENGTH, (8, 16), VOCABULARY, torch.Generator().manual_seed(2), draw=KINDS["end"])
    for tokens, queries, answers, sources in zip(*batch.parts()):
        assert torch.equal(tokens.flatten()[queries], tokens.flatten()[sources])
        assert torch.equal(tokens.flatten()[sources + 1], answers)


@pytest.mark.parametrize(
    ("kind", "length", "pairs", "message"),
    [
        ("any", 32, 9, "pairs must be"),
        ("end", 96, 8, "power of two"),
        ("end", 64, 2, "at least 4"),
        ("latest-first", 64, 6, "multiple of 4"),
        ("tagged", 1024, 128, "four classes"),
    ],
)
def test_sizes_that_do_not_fit_a_kind_are_refused(kind, length, pairs, message):
    with pytest.raises(ValueError, match=message):
        KINDS[kind](2, length, pairs, 258, torch.Generator().manual_seed(0))
