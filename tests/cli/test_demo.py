"""`loglinear demo` at the smallest size: all of its parts, and a verdict that follows the numbers."""

from __future__ import annotations

import json

import pytest

from loglinear.cli import main
from loglinear.cli.demo import MIXERS, verdict


def test_the_demo_compares_the_twins_and_says_where_everything_lies(texts, tmp_path, capsys):
    output = tmp_path / "demo"
    sizes = ["--context", "64", "--steps", "6", "--hidden-size", "16", "--vocab-size", "300", "--max-new-tokens", "5"]
    command = ["demo", "--output", str(output), "--data", str(texts), *sizes]
    assert main(command) == 0
    printed = capsys.readouterr().out
    numbers = json.loads((output / "comparison.json").read_text())
    first, second = (numbers["models"][name] for name in MIXERS)
    assert numbers["difference"]["value"] == pytest.approx(first["loss"] - second["loss"], abs=1e-6)
    for name, mixer in MIXERS.items():
        record = json.loads((output / mixer / "record.json").read_text())
        assert record["metrics"]["validation_loss"] == pytest.approx(numbers["models"][name]["loss"], rel=1e-5)
        parameters = f"{record['model']['parameters']:,}"
        (row,) = (line for line in printed.splitlines() if line.startswith(f"│ {name}"))
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[1] == f"{numbers['models'][name]['perplexity']:.3f}"
        assert cells[3] == parameters
        assert str(output / mixer) in printed
    records = [json.loads((output / mixer / "record.json").read_text()) for mixer in MIXERS.values()]
    differing = [name for name, value in records[0]["arguments"].items() if records[1]["arguments"][name] != value]
    assert differing == ["mixer"]
    assert records[0]["data"] == records[1]["data"]
    assert (output / "loss_by_position.png").stat().st_size > 10_000
    assert "recurrent state" in printed

    assert main(command) == 0
    again = capsys.readouterr().out
    assert again.count("complete: nothing to do") == 2


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (-0.05, "Log-Linear Mamba-2 is better than Mamba-2 (linear) by 0.0500"),
        (0.05, "Mamba-2 (linear) is better than Log-Linear Mamba-2 by 0.0500"),
        (0.015, "no winner"),
    ],
)
def test_the_verdict_follows_the_numbers(difference, words):
    assert words in verdict(difference, 0.01)
