"""Sequences of associative recall against their definition: pairs, slots, queries, answers, and what is kept apart."""

from __future__ import annotations

import pytest
import torch

from loglinear.tasks.mqar.data import check_sizes, draw, draw_batches, fingerprints, slot_probabilities

LENGTH, PAIRS, VOCABULARY, ROWS = 64, 12, 96, 4000


@pytest.fixture(scope="module")
def recall():
    return draw(ROWS, LENGTH, PAIRS, VOCABULARY, torch.Generator().manual_seed(1))


def test_keys_and_values_are_distinct_and_from_their_halves(recall):
    keys, values = recall.tokens[:, 0 : 2 * PAIRS : 2], recall.tokens[:, 1 : 2 * PAIRS : 2]
    assert int(keys.min()) == 1
    assert int(keys.max()) == VOCABULARY // 2 - 1
    assert int(values.min()) == VOCABULARY // 2
    assert int(values.max()) == VOCABULARY - 1
    for x in (keys, values):
        assert (x.sort(1).values.diff(dim=1) > 0).all()
        counts = x.flatten().bincount(minlength=VOCABULARY)
        counts = counts[counts > 0].double()
        expected = ROWS * PAIRS / len(counts)  # about 1,021; five standard deviations of a binomial are about 160
        assert (counts - expected).abs().max() < 5 * expected**0.5


def test_each_key_is_asked_once_after_the_pairs_and_the_answer_is_its_value(recall):
    rows = recall.queries.view(ROWS, PAIRS) // LENGTH
    positions = recall.queries.view(ROWS, PAIRS) % LENGTH
    assert torch.equal(rows, torch.arange(ROWS)[:, None].expand(ROWS, PAIRS))
    assert (positions >= 2 * PAIRS).all()
    assert (positions % 2 == 0).all()
    assert (positions.sort(1).values.diff(dim=1) > 0).all()
    asked = recall.tokens.flatten()[recall.queries].view(ROWS, PAIRS)
    for row in range(0, ROWS, 97):
        tokens = recall.tokens[row].tolist()
        pairs = dict(zip(tokens[0 : 2 * PAIRS : 2], tokens[1 : 2 * PAIRS : 2]))
        assert sorted(asked[row].tolist()) == sorted(pairs)
        answers = recall.answers.view(ROWS, PAIRS)[row].tolist()
        assert [pairs[key] for key in asked[row].tolist()] == answers


def test_one_query_falls_into_slots_by_the_power_law():
    rows, length = 40_000, 64
    drawn = draw(rows, length, 1, 96, torch.Generator().manual_seed(2))
    slots = (drawn.queries % length - 2) // 2
    weights = [slot ** (0.01 - 1) for slot in range(1, 32)]  # written out, not slot_probabilities
    expected = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    torch.testing.assert_close(slot_probabilities(length, 1).double(), expected, rtol=1e-5, atol=0)
    counts = slots.bincount(minlength=31).double()
    chi_squared = ((counts - rows * expected) ** 2 / (rows * expected)).sum()
    assert chi_squared < 70  # 30 degrees of freedom: above 70 once in 20,000


def test_several_queries_are_drawn_one_after_the_other_without_replacement():
    rows, pairs = 40_000, 2
    drawn = draw(rows, 12, pairs, 96, torch.Generator().manual_seed(3))  # four slots
    slots = (drawn.queries.view(rows, pairs) % 12 - 4) // 2
    p = [slot ** (0.01 - 1) for slot in range(1, 5)]
    p = [weight / sum(p) for weight in p]
    for first in range(4):
        for second in range(4):
            chance = 0.0 if first == second else p[first] * p[second] / (1 - p[first])
            share = float(((slots[:, 0] == first) & (slots[:, 1] == second)).double().mean())
            assert abs(share - chance) < 5 * (chance / rows) ** 0.5 + 1e-12


def test_all_other_tokens_are_uniform_over_the_vocabulary(recall):
    is_filler = torch.ones(ROWS * LENGTH, dtype=torch.bool)
    is_filler[recall.queries] = False
    is_filler.view(ROWS, LENGTH)[:, : 2 * PAIRS] = False
    counts = recall.tokens.flatten()[is_filler].bincount(minlength=VOCABULARY).double()
    expected = ROWS * (LENGTH - 3 * PAIRS) / VOCABULARY
    assert len(counts) == VOCABULARY
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_a_batch_holds_equal_shares_of_the_mixture_and_its_queries_point_into_it():
    mixture, rows, batches = (1, 4, 8), 12, 5
    drawn = draw_batches(batches, rows, 32, mixture, 64, torch.Generator().manual_seed(4))
    assert drawn.tokens.shape == (batches, rows, 32)
    assert drawn.queries.shape == drawn.answers.shape == (batches, 4 * sum(mixture))
    for tokens, queries, answers in zip(drawn.tokens, drawn.queries, drawn.answers):
        counts = (queries // 32).bincount(minlength=rows).tolist()
        assert counts == [1] * 4 + [4] * 4 + [8] * 4
        for query, answer in zip(queries.tolist(), answers.tolist()):
            row, position = divmod(query, 32)
            before = tokens[row, : 2 * counts[row]].tolist()
            assert before[before[0::2].index(int(tokens[row, position])) * 2 + 1] == answer


def test_the_seed_decides_and_seeds_differ():
    one, same, other = (draw(8, 32, 4, 64, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(one.tokens, same.tokens)
    assert torch.equal(one.queries, same.queries)
    assert not torch.equal(one.tokens, other.tokens)


def test_sequences_drawn_apart_share_none_and_still_fit_the_definition():
    # Four tokens from a vocabulary of six: 2 keys, 3 values, one filler, 36 sequences in all, so collisions are certain.
    held_out = draw(8, 4, 1, 6, torch.Generator().manual_seed(7))
    apart = fingerprints(held_out.tokens)
    drawn = draw_batches(10, 20, 4, (1,), 6, torch.Generator().manual_seed(8), apart)
    rows = {tuple(row) for row in drawn.tokens.flatten(0, 1).tolist()}
    assert not rows & {tuple(row) for row in held_out.tokens.tolist()}
    assert len(rows) > 20
    for tokens, queries, answers in zip(drawn.tokens, drawn.queries, drawn.answers):
        assert torch.equal(queries, torch.arange(20) * 4 + 2)
        assert torch.equal(tokens[:, 1], answers)
        assert torch.equal(tokens[:, 0], tokens[:, 2])


def test_a_vocabulary_that_holds_too_few_sequences_is_refused():
    everything = draw(2000, 4, 1, 6, torch.Generator().manual_seed(9))
    with pytest.raises(ValueError, match="vocab_size: 6 is too small"):
        draw_batches(1, 4, 4, (1,), 6, torch.Generator().manual_seed(10), fingerprints(everything.tokens))


def test_fingerprints_tell_permutations_apart():
    tokens = torch.tensor([[1, 2, 3], [3, 2, 1], [1, 2, 3]])
    first, second, third = fingerprints(tokens).tolist()
    assert first == third != second


@pytest.mark.parametrize(("length", "pairs", "vocabulary"), [(16, 5, 64), (16, 0, 64), (64, 16, 32)])
def test_sizes_that_do_not_fit_are_refused(length, pairs, vocabulary):
    with pytest.raises(ValueError, match=r"pairs must be|vocab_size must be"):
        check_sizes(length, pairs, vocabulary)
