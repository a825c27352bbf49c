"""docs/training.md: its tables are what the committed rows say, and a ratio never mixes commits."""

import pytest

import training_page
from training_page import PAGE, filled, newest, read, required, steps


def row(model, T, commit, rate, **more):
    common = {"gpu": "H", "torch": "2", "triton": "3", "tokens": 1 << 15, "residual": "float32", "offload": False}
    times = {"ms": 1e3, "ms_low": 1e3, "ms_high": 1e3, "peak_bytes": 1 << 30, "flop_share": 0.5, "tokens_per_s": rate}
    kind = {"B": 1, "T": T, "commit": commit, "compiled": "for the length", "checkpointing": False, "longest": False}
    return {"model": model, **common, **times, **kind, **more}


def test_the_committed_page_is_made_of_the_committed_rows():
    text = PAGE.read_text(encoding="utf-8")
    assert filled(text, read()) == text, "run python benchmarks/training_page.py"


def test_a_ratio_is_of_the_newest_commit_that_has_both():
    flash, ours = "transformer, flash attention 2", "log_linear_mamba2"
    rows = [row(flash, 1 << 14, "a", 10), row(ours, 1 << 14, "a", 20), row(ours, 1 << 14, "b", 50)]
    (line,) = required(rows)[2:]
    assert "2.00x" in line
    assert line.endswith("| a |")
    rows += [row(flash, 1 << 14, "b", 10)]
    (line,) = required(rows)[2:]
    assert "5.00x" in line
    assert line.endswith("| b |")


def test_the_length_from_which_on_is_of_all_lengths_each_at_one_commit():
    flash, ours = "transformer, flash attention 2", "log_linear_mamba2"
    rows = [row(m, T, "a", rate) for T in (1 << 12, 1 << 13) for m, rate in ((flash, 10), (ours, 20))]
    rows += [
        row(m, T, "b", rate) for T, rate in ((1 << 11, 5), (1 << 14, 20)) for m, rate in ((flash, 10), (ours, rate))
    ]
    rows += [row(ours, 1 << 12, "c", 1)]  # nothing to compare it with
    line = next(line for line in required(rows) if "is faster than" in line)
    assert "from 4,096 tokens on" in line
    assert line.endswith("| b, a |")


def test_steps_are_the_newest_of_their_kind():
    rows = [
        row("mamba2, ssd", 1 << 14, "a", 10),
        row("mamba2, ssd", 1 << 14, "b", 20),
        row(
            "mamba2, ssd",
            1 << 14,
            "b",
            30,
            checkpointing=True,
            residual="bfloat16",
            allocator="expandable_segments:True",
        ),
        row("log_linear_mamba2", 1 << 13, "a", 40),
    ]
    assert [(x["T"], x["tokens_per_s"]) for x in newest(rows)] == [(1 << 13, 40), (1 << 14, 20), (1 << 14, 30)]
    assert "| Mamba-2, SSD | bfloat16 stream, checkpointed, growing segments | b | 16,384 |" in steps(rows)[-1]


def test_every_column_has_a_name():
    from training_models import COLUMNS

    assert training_page.SHOWN.keys() == COLUMNS.keys()


@pytest.mark.parametrize("text", ["", training_page.BEGIN, f"{training_page.END} {training_page.BEGIN}"])
def test_a_page_without_marks_is_an_error(text):
    with pytest.raises(ValueError, match="must have <!-- rows -->"):
        filled(text, [])
