"""Who checks the oracle: the fast one is the literal one, and levels are the picture drawn for 8 tokens."""

import pytest
import torch

from oracle import SAME_NUMBERS, error, levels_seen, linear_recurrence, literal, make_inputs, oracle, oracle_row


def test_levels_of_the_picture():
    picture = ["0", "10", "220", "2210", "33330", "333310", "3333220", "33332210"]
    assert ["".join(map(str, levels_seen(t))) for t in range(8)] == picture


@pytest.mark.parametrize("gate", ["identity", "scalar", "diagonal", "delta", "diagonal delta"])
def test_the_oracles_agree(gate):
    x = make_inputs(B=2, T=18, H=2, G=1, K=2, V=3, L=4, gate=gate)
    expected = literal(**x, scale=0.7)
    assert error(oracle(**x, scale=0.7), expected) <= SAME_NUMBERS
    if gate in ("scalar", "delta"):
        alone = {name: tensor[1] for name, tensor in x.items()}
        for t in range(18):
            assert error(0.7 * torch.from_numpy(oracle_row(t, **alone)), expected[1, t]) <= SAME_NUMBERS
    del x["level_scales"]
    assert error(linear_recurrence(**x), literal(**x)) <= SAME_NUMBERS
