"""Tables of packed sequences are computed once for each tensor of offsets, and anew when it changes."""

import gc

import torch

from loglinear.kernels import problem


def tables(offsets, tree=False):
    return problem.packed_tables(offsets, 200, 64, tree)


def test_the_same_offsets_give_the_same_tables():
    offsets = torch.tensor([0, 70, 200])
    first = tables(offsets)
    assert all(a is b for a, b in zip(first, tables(offsets)))
    assert len(tables(offsets, tree=True)) > len(first)
    assert all(a is b for a, b in zip(first, tables(offsets)))


def test_offsets_that_were_written_to():
    offsets = torch.tensor([0, 70, 200])
    before = tables(offsets)[1].tolist()
    offsets[1] = 130
    assert tables(offsets)[1][:, 1].tolist() == [130, 70]
    offsets[1] = 70
    assert tables(offsets)[1].tolist() == before


def test_tables_go_with_their_offsets():
    offsets = torch.tensor([0, 70, 200])
    tables(offsets)
    count = len(problem._known_tables)
    del offsets
    gc.collect()
    assert len(problem._known_tables) < count


def test_offsets_of_inference_mode():
    with torch.inference_mode():
        offsets = torch.tensor([0, 70, 200])
        assert tables(offsets)[1][:, 1].tolist() == [70, 130]
        offsets[1] = 130
        assert tables(offsets)[1][:, 1].tolist() == [130, 70]
