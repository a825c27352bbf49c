"""The opening of the page of results: gains of paired seeds, and verdicts that follow the numbers."""

from __future__ import annotations

import json

import pytest

import report
from collect_stacks import collect
from recall_plan import FRESH_SEEDS, Arm, chooser, fresh, sweep
from reporting import levels
from text_stacks import Copy, asdict

pytestmark = pytest.mark.default_packages


def recall_rows(kind: str, gain: float, spread: float) -> list[dict]:
    """Mamba-2 at 40%, and its log-linear twin by ``gain`` above, more or less by ``spread``."""
    rows = []
    for model, start, more in (("Mamba-2", "noise", 0.0), ("Log-Linear Mamba-2", "one", gain)):
        arm = Arm(kind, model, start)
        for cell in [*sweep(chooser(arm)), *fresh(arm, 0.01)]:
            own = more and spread * (-1) ** cell.seed
            share = 0.4 + 0.01 * cell.seed + more + own - (cell.learning_rate != 0.01)
            rows.append(
                {"cell": cell.identity(), "test": {"32": share}, "validation": {"32": share}, "final_loss": 1.0}
            )
    return rows


def text_rows(gain: float) -> list[dict]:
    rows = []
    for mixer, start, more in (("mamba2", "", 0.0), ("log_linear_mamba2", "one", gain)):
        for seed in range(4):
            losses = [1.0 + 0.01 * seed + more + 1e-4 * (seed % 2) * bool(more)] * 16
            needles = {"4 keys 8192": 0.5 + 10 * more, "4 keys 16384": 0.25, "4 keys 16384 as they are": 0.0}
            copy = asdict(Copy(mixer, start, 1e-3, seed, seed))
            rows.append({"copy": copy, "test": losses, "far": losses, "needles": needles})
    return rows


@pytest.mark.parametrize(
    ("gain", "spread", "verdict"),
    [(0.1, 0.01, "better"), (-0.1, 0.01, "worse"), (0.1, 0.2, "undecided")],
)
def test_a_verdict_follows_the_difference_and_its_error(gain, spread, verdict):
    (found,) = levels.recall_gains(recall_rows("any", gain, spread))
    assert found.verdict == verdict
    assert found.seeds == len(FRESH_SEEDS)
    assert found.linear == pytest.approx(44.0)
    signs = sum((-1) ** seed for seed in FRESH_SEEDS) / len(FRESH_SEEDS)
    assert found.difference.value == pytest.approx(100 * (gain + spread * signs))


def test_perplexity_is_better_where_it_is_lower_and_needles_leave_out_levels_read_as_they_are():
    rows = text_rows(-0.02)
    perplexity = list(levels.text_gains(rows))
    assert [gain.verdict for gain in perplexity] == ["better"] * 3
    assert perplexity[0].difference.value == pytest.approx(-1.98, abs=0.02)
    inside, beyond = levels.needle_gains(rows)
    assert (inside.where, inside.difference.value) == ("needles, 4 keys, to 8K", pytest.approx(-20.0))
    assert beyond.log_linear == 25.0


def test_needles_join_the_row_of_their_training(tmp_path):
    trained, tested = ({"copy": {"seed": 1}, name: [1.0]} for name in ("test", "needles"))
    (tmp_path / "text_stacks.jsonl").write_text(json.dumps(trained) + "\n")
    found = collect([tested, {"cell": {"seed": 2}}], tmp_path)
    assert found == {
        "recall": [{"cell": {"seed": 2}}],
        "text_stacks": [trained | tested],
        "documents": [],
        "genome": [],
    }


def test_the_page_opens_with_the_table_and_says_where_levels_pay(tmp_path):
    rows = recall_rows("any", 0.1, 0.01) + recall_rows("end", -0.1, 0.01)
    (tmp_path / "recall.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report.page(report.sections(tmp_path), {}, report.opening(tmp_path))
    assert text.index("Gains of levels by task") < text.index("When to use it") < text.index("## Larger models")
    assert text.index("## Needle") < text.index("## What was required")
    assert (
        "**Log-linear is better** in 1 of 2 comparisons of the table: recall, pairs and queries anywhere (Mamba-2"
        in text
    )
    assert "**Log-linear is worse** in 1 of 2" in text
    drawn = levels.draw(levels.gains(rows, text_rows(-0.02)), tmp_path / "levels_add")
    assert all(path.stat().st_size > 5_000 for path in drawn)
