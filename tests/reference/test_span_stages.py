"""The output by spans of four chunks is the definition in float64, with resets, too few levels, and any number of tokens."""

from itertools import accumulate, pairwise

import pytest
import torch
from forms import FORMS

from loglinear.reference.stages import decay, span
from loglinear.reference.stages.place import Place, cut
from oracle import TOLERANCES, error, make_inputs

pytestmark = pytest.mark.default_packages
CASES = {  # tokens of each sequence, levels; chunks of 8 tokens, spans of 32
    "one token": ((1,), 1),
    "less than a span": ((27,), 6),
    "spans and a token": ((129,), 8),
    "too few levels": ((130,), 3),
    "as many levels as a span": ((100,), 6),
    "packed": ((33, 0, 5, 70), 7),
}


@pytest.fixture(params=CASES)
def lengths_and_levels(request):
    return CASES[request.param]


def make(lengths, levels, hard):
    """(inputs, place, inputs in chunks, states, the states without the entries that no span reads)."""
    x = make_inputs(B=1, T=sum(lengths), L=levels, gate="scalar")
    if hard:
        x["g"][:, [t for t in (0, 5, 8, 17, 24, 31, 63) if t < sum(lengths)]] = -torch.inf
        x["g"][:, 20:22] = -1e30
    place = Place(lengths, 8)
    given = cut(place, **x, do=torch.randn_like(x["v"]), scale=0.7)
    states = decay.node_states(place, decay.chunk_states(place, given))
    short = place.n + 1 & -(place.n + 1) < 4
    return (
        x,
        place,
        given,
        states,
        states._replace(entries=states.entries.masked_fill(short[:, None, None, None], torch.nan)),
    )


@pytest.mark.parametrize("hard", [False, True], ids=["gates", "resets"])
def test_the_output_by_spans_is_the_definition(lengths_and_levels, hard):
    lengths, levels = lengths_and_levels
    x, place, given, _, states = make(lengths, levels, hard)
    parts = [{n: y[:, a:b] for n, y in x.items()} for a, b in pairwise(accumulate(lengths, initial=0))]
    wanted = torch.cat([FORMS["dense"](**part, scale=0.7) for part in parts], 1)
    got = place.tokens(span.output(place, given, states), x["v"])
    assert error(got, wanted) <= TOLERANCES[torch.float64]


@pytest.mark.parametrize("hard", [False, True], ids=["gates", "resets"])
def test_the_query_side_by_spans_is_that_of_chunks(lengths_and_levels, hard):
    """The stages of chunks are compared with the definition in test_stage_twins.py."""
    _, place, given, states, spans = make(*lengths_and_levels, hard)
    inner = decay.local_grads(place, given, states)[:3]
    wanted = decay.query_grads(place, given, states, *inner)
    for got, want in zip(span.query_side(place, given, spans, *inner), wanted, strict=True):
        assert error(got, want) <= TOLERANCES[torch.float64]


@pytest.mark.parametrize("hard", [False, True], ids=["gates", "resets"])
def test_the_key_side_by_tiles_is_that_of_chunks(lengths_and_levels, hard):
    _, place, given, states, _ = make(*lengths_and_levels, hard)
    score_grads, inner, rows, columns = decay.local_grads(place, given, states)
    levels = decay.query_grads(place, given, states, score_grads, inner, rows)[3]
    ends, beyond = decay.chunk_grads(place, given, states, decay.node_grads(place, given, states))
    dv, columns_then, chunks = decay.value_grads(place, given, states, ends, columns)
    wanted = decay.key_grads(place, given, states, ends, score_grads), dv, columns_then, chunks
    ends[place.n & 1 == 0] = torch.nan
    *found, passed = span.key_side(place, given, states, ends, score_grads, columns)
    for got, want in zip(found, wanted, strict=True):
        assert error(got, want) <= TOLERANCES[torch.float64]
    if len(place.levels) > 1:
        entry = place.reads[1][1]
        assert error(span.pair_beyond(place, passed, levels)[entry], beyond[entry]) <= TOLERANCES[torch.float64]
