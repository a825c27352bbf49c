"""Pairs of a plain and a lifted model: the differences that are printed, and the figure of the committed rows."""

from __future__ import annotations

import pytest

from lift import differences, needle_differences, share
from lift_figure import draw_lift
from reporting.rows import read


def needle_row(kind: str, tune: int, right: str) -> dict:
    cells = [
        {"kind": "word", "right": right[:2]},
        {"kind": "word", "right": right[2:]},
        {"kind": "number", "right": "0"},
    ]
    return {"base": "mamba2-s0", "mixer": "mamba2", "kind": kind, "tune_seed": tune, "cells": cells}


def test_needles_of_pairs():
    rows = [needle_row("plain", 1, "1100"), needle_row("lifted", 1, "1110"), needle_row("plain", 2, "1111")]
    assert share(rows[1], "word") == 0.75
    assert list(needle_differences([*rows, needle_row("lifted", 2, "1010")])) == [
        "mamba2 number: plain 0.000, lifted 0.000, lifted ahead in 0 of 2 fine-tunes",
        "mamba2 word: plain 0.750, lifted 0.625, lifted ahead in 1 of 2 fine-tunes",
    ]
    (word,) = [line for line in needle_differences(rows) if "word" in line]  # the second has no lifted model
    assert word.endswith("plain 0.500, lifted 0.750, lifted ahead in 1 of 1 fine-tunes")


def test_losses_of_pairs():
    def row(kind, losses):
        measured = {"per_sequence": {"losses": losses}, "repeats": []}
        return {"base": "mamba2-s0", "kind": kind, "evaluations": {"4-document": measured}}

    rows = [row("plain", [[1.0, 2.0], [3.0, 4.0]]), row("lifted", [[0.5, 1.0], [2.5, 3.0]])]
    lines = list(differences(rows))
    assert lines[0] == "mamba2-s0 4-document all: lifted - plain -0.7500 ± 0.0000 nats a token"
    assert [line.split(" - plain ")[1].split()[0] for line in lines[1:]] == ["-0.5000", "-1.0000"]


def test_the_figure_of_the_committed_rows(tmp_path):
    losses, needles = read("lift"), read("lift_needles")
    assert len(losses) == 8
    assert len(needles) == 16
    for path in draw_lift(losses, needles, tmp_path / "lift.png"):
        assert path.stat().st_size > 20_000
    with pytest.raises(KeyError):  # a pair without its other half
        draw_lift(losses[:1], needles, tmp_path / "half.png")
