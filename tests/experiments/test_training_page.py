"""docs/training.md: its tables are what the committed rows say, and a ratio never mixes commits."""

import pytest

import training_page
from reporting.training import FLASH, figures
from training_page import PAGE, filled, newest, read, required, steps


def row(model, T, commit, rate, **more):
    common = {"gpu": "H", "torch": "2", "triton": "3", "tokens": 1 << 15, "residual": "float32", "offload": False}
    times = {"ms": 1e3, "ms_low": 1e3, "ms_high": 1e3, "peak_bytes": 1 << 30, "flop_share": 0.5, "tokens_per_s": rate}
    kind = {"B": 1, "T": T, "commit": commit, "compiled": "for the length", "checkpointing": False, "longest": False}
    return {"model": model, **common, **times, **kind, **more}


def test_the_committed_page_is_made_of_the_committed_rows():
    text = PAGE.read_text(encoding="utf-8")
    assert filled(text, read()) == text, "run python experiments/training_page.py"


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


def test_what_is_required():
    def rated(model, T, rate, **more):
        return {"model": model, "T": T, "tokens_per_s": rate, "checkpointing": T > 1 << 16, "longest": False, **more}

    rows = [rated("log_linear_mamba2", 1 << n, rate) for n, rate in ((12, 10), (13, 9), (16, 8), (17, 6))]
    rows += [rated(FLASH, 1 << n, rate) for n, rate in ((12, 12), (13, 9), (16, 2))]
    rows += [rated("log_linear_mamba2", 1 << 14, 8, outside_share=0.3), rated("mamba2, ssd", 1 << 14, 10)]
    rows += [rated("log_linear_mamba2", 1 << 19, 5) | {"longest": True, "peak_bytes": 3 << 30}]
    assert [f"{what}: {figure}" for what, figure in figures(rows).items()] == [
        "Log-Linear Mamba-2 over the Transformer, FlashAttention-2, at 64K: 4.00x (required 3.0x)",
        "Log-Linear Mamba-2 over Mamba-2 with SSD at 16K: 0.80x (required 0.95x)",
        "Log-Linear Mamba-2 at 131K over 16K: 0.75x (required 0.75x; only one of them checkpoints activations)",
        "Log-Linear Mamba-2 is faster than the Transformer, FlashAttention-2: from 8,192 tokens on (required 8,192)",
        "log_linear_mamba2 outside of products and op at 16K: 30.0% (required at most 35%)",
        "longest context in one step: 524,288 tokens, 3.0 GiB (required 524,288)",
    ]


def test_the_figure_has_the_rows_of_one_size(tmp_path, monkeypatch):
    def run(*options):
        monkeypatch.setattr("sys.argv", ["training_page.py", "--figure", str(tmp_path / "training.png"), *options])
        training_page.main()

    run("--models", "log_linear_mamba2", FLASH)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "training.svg").read_text()
    with pytest.raises(SystemExit, match="no rows of these sizes"):
        run("--residual", "float16")
