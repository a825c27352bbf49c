"""The page from made-up rows: every table and verdict follows the numbers, and turns when they do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from run_folders import recall_row, write_recall, write_run, write_tune

import report
from collect import collect
from reporting import associative, language, needles, recall
from reporting.figures import draw_all
from reporting.rows import RESULTS, read
from reporting.statistics import Difference, Repeats, outcome, paired, repeats_difference, share_closed
from reporting.text import signed

NAMES = "Log-Linear Mamba-2", "Mamba-2"


@pytest.fixture
def made(tmp_path):
    """Rows of one pair and of softmax attention; ``log_linear`` says how the log-linear model differs."""

    def make(log_linear: dict, seeds: tuple[int, ...] = (0, 1), softmax: dict | None = None) -> dict[str, list[dict]]:
        out = tmp_path / "out"
        write_run(out, "attention-s0", **({"level": -0.1, "repeats": 0.5} | (softmax or {})))
        for seed in seeds:
            write_run(out, f"mamba2-s{seed}", repeats=1.0, retrieved="0000000001", found=0.5)
            write_run(out, f"log_linear_mamba2-s{seed}", **log_linear)
        list(collect(out, tmp_path / "results", "abc", out / "mqar"))
        return {name: read(name, tmp_path / "results") for name in ("lm", "niah")}

    return make


def cells(lines: list[str], *first: str) -> list[str]:
    """The cells of the only table line that starts with these."""
    found = [line for line in lines if line.startswith("| " + " | ".join(first) + " |")]
    assert len(found) == 1, found
    return [cell.strip() for cell in found[0].strip("|").split("|")][len(first) :]


def results_of(section, name: str = NAMES[0]) -> list[str]:
    return [verdict.result for verdict in section.verdicts if name in verdict.requirement]


# ------------------------------------------------------------------------------------------------------------ statistics


def test_differences_are_paired_and_count_beyond_two_errors():
    one, other = np.array([1.0, 2.0, 3.0]), np.array([0.8, 2.0, 2.8])
    difference = paired(one, other)
    assert difference.value == pytest.approx(0.4 / 3)
    assert difference.error == pytest.approx(np.std([0.2, 0, 0.2], ddof=1) / 3**0.5)
    assert paired(one[:1], other[:1]).sign == 0
    assert [Difference(value, 0.1).sign for value in (-0.21, -0.19, 0.21)] == [-1, 0, 1]
    clear, unclear = Difference(-1, 0.1), Difference(-1, 0.6)
    assert [outcome([clear]), outcome([clear, clear]), outcome([clear, unclear]), outcome([])] == [-1, -1, 0, 0]
    assert [signed(x, 1) for x in (0.04, -0.04, 0.06, -0.06)] == ["0.0", "0.0", "+0.1", "−0.1"]


def test_the_share_of_a_gap_and_its_error():
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 50, 200)
    at = [Repeats(counts * (level + rng.normal(0, 0.1, 200)), counts) for level in (1.0, 0.7, 0.5)]
    share = share_closed(*at)
    assert share.value == pytest.approx(0.6, abs=4 * share.error)
    difference = repeats_difference(at[1], at[0])
    assert difference.value == pytest.approx(-0.3, abs=4 * difference.error)
    # The delta method's error, from the spread of what is left of each sequence.
    gap = at[0].loss - at[2].loss
    rest = (at[0].sums - at[1].sums) - share.value * (at[0].sums - at[2].sums)
    assert share.error == pytest.approx((rest**2).sum() ** 0.5 / counts.sum() / gap, rel=0.05)
    assert share_closed(at[2], at[1], at[0]) is None


# -------------------------------------------------------------------------------------------------------------- language


@pytest.mark.parametrize(
    ("differs", "results", "said"),
    [
        ({"level": -0.02}, ["met", "met"], ["lower", "lower"]),
        ({"level": 0.02}, ["not met", "not met"], ["higher", "higher"]),
        ({"level": 0.02, "far": -0.08}, ["met", "met"], ["lower", "lower"]),
        ({"far": 0.02}, ["not met", "not met"], ["higher", "higher"]),
    ],
)
def test_lower_loss_is_met_where_the_loss_is_lower(made, differs, results, said):
    section = language.section(made({"repeats": 1.0} | differs)["lm"])
    assert results_of(section) == results
    assert results_of(section, "Log-Linear Gated DeltaNet") == ["not run", "not run"]
    pair = f"{NAMES[0]} − {NAMES[1]}"
    table = [line for line in section.lines if line.startswith(f"| {pair}")]
    assert [line.split(" | ")[2] for line in table if "of 16,384" in line] == said
    assert [line.split(" | ")[1] for line in table] == [
        f"from {first} of {context}, 6 sequences"
        for first, context in (("0", "16,384"), ("8,192", "16,384"), ("0", "65,536"), ("16,384", "65,536"))
    ]


def test_a_difference_in_one_seed_only_is_noise(made, tmp_path):
    made({"level": -0.02, "repeats": 1.0})
    write_run(tmp_path / "out", "log_linear_mamba2-s1", level=0.0001, repeats=1.0)
    list(collect(tmp_path / "out", tmp_path / "results", "abc", tmp_path / "out" / "mqar"))
    assert results_of(language.section(read("lm", tmp_path / "results")))[0] == "no clear difference"


def test_the_table_of_models_and_costs(made, tmp_path):
    rows = made({"level": -0.02, "repeats": 1.0})["lm"]
    lines = language.section(rows).lines
    values = cells(lines, NAMES[0])
    assert values[:4] == ["12", "51.0M", "39M", "4.393, 4.393"]
    assert values[5:] == ["100K (100K to 100K)", "30.5"]
    assert any(
        "trains at 100% of the tokens/s of Mamba-2, with 100% of its peak memory and +2.0% parameters" in x
        for x in lines
    )
    rows[0]["arguments"]["learning_rate"] = 3e-4
    assert "differ in these arguments, too: learning_rate" in "\n".join(language.section(rows).lines)
    rows[0]["arguments"]["data"] = "the same text.jsonl.xz"
    assert "too: learning_rate (" in "\n".join(language.section(rows).lines), "a name is none of the text's"
    rows[0]["arguments"]["data"] = ["texts/one.txt", "more"]
    assert ", AdamW, on `one.txt, more` (hash" in "\n".join(language.section(rows).lines)
    rows[0]["data"]["hash"] = "another text"
    assert "too: data, learning_rate (" in "\n".join(language.section(rows).lines)
    renamed = [row | {"name": "mamba2-wide"} if row["name"] == "mamba2-s1" else row for row in rows]
    assert cells(language.section(renamed).lines, "mamba2-wide") == ["50.0M", "39M", "1.5000"]


def test_models_are_not_compared_on_different_text(made):
    rows = made({})["lm"]
    rows[1]["evaluations"]["16384-stream"]["hash"] = "other"
    with pytest.raises(ValueError, match="evaluated on different sequences"):
        language.section(rows)


# ---------------------------------------------------------------------------------------------------------------- recall


@pytest.mark.parametrize(
    ("repeats", "result", "share", "said"),
    [(0.7, "met", "60%", "lower"), (0.8, "not met", "40%", "lower"), (1.1, "not met", "−20%", "higher")],
)
def test_half_of_the_gap_on_repeats(made, repeats, result, share, said):
    section = recall.section(made({"repeats": repeats})["lm"])
    assert results_of(section) == [result]
    text = "\n".join(section.lines)
    assert re.search(rf"beyond 4K \([\d,]+ tokens\): {repeats:.3f} against 1.000, {said} ", text)
    assert f"The log-linear model closes {share} ± 0 of the gap to softmax attention." in text
    distances = [line for line in section.lines if line.startswith("| 4,096 to 8,191")]
    assert [line.split(" | ")[2:] for line in distances] == [["0.500", "1.000", f"{repeats:.3f} |"]] * 2


def test_without_a_gap_there_is_nothing_to_close(made):
    section = recall.section(made({"repeats": 0.7}, softmax={"repeats": 1.2})["lm"])
    assert results_of(section) == ["no gap"]
    assert "there is no gap to close" in "\n".join(section.lines)


@pytest.mark.parametrize(
    ("retrieved", "said"),
    [
        ("1111110001", "above Mamba-2 over all distances (+60.0 ± 16.3 points); clearly above at 1,024, 65,536, "),
        ("0000000001", "no clear difference to Mamba-2 over all distances (0.0 ± 0.0 points); clearly above at none, "),
    ],
)
def test_definitions_are_compared_question_by_question(made, retrieved, said):
    section = recall.section(made({"retrieved": retrieved})["lm"])
    assert said in "\n".join(section.lines)
    line = next(line for line in section.lines if line.startswith("| 1,024 |"))
    assert line == f"| 1,024 | 10 | 0% (0%) | 10% (0%) | {10 * retrieved.count('1')}% (0%) |"


def test_levels_are_averaged_over_layers(made):
    lines = recall.section(made({})["lm"]).lines
    assert "| 5 | 1.100 (1.100 to 1.100) |" in lines
    assert "- Log-Linear Mamba-2: λ of level 5 is 1.57 times that of level 1 (1.100 against 0.700)." in lines


# --------------------------------------------------------------------------------------------------------------- needles


@pytest.mark.parametrize(
    ("found", "above", "below", "share", "mean"),
    [
        (0.8, 1, 0, "80% ± 5", "+30.0 ± 6.0"),
        (0.55, 0, 0, "55% ± 6", "+5.0 ± 2.8"),  # of 60 samples the same 30, and 3 more
        (0.2, 0, 1, "20% ± 5", "−30.0 ± 6.0"),
    ],
)
def test_needles_are_compared_sample_by_sample(made, found, above, below, share, mean):
    rows = made({"found": found})
    lines = needles.section(rows["niah"], rows["lm"]).lines
    assert cells(lines, "number", "1,024")[1:] == ["50% ± 6", share]
    for where in ("at lengths of the fine-tune", "beyond them"):
        expected = f"{where}: clearly above in {above} of 1 cells of the table, clearly below in {below}; {mean} points"
        assert sum(expected in line for line in lines) == 1


def test_needles_after_different_fine_tunes_are_not_compared(made):
    rows = made({})
    rows["lm"][0]["tuned"]["steps"] = 301
    with pytest.raises(ValueError, match="fine-tuned in different ways"):
        needles.section(rows["niah"], rows["lm"])


def test_further_fine_tunes_stand_beside_the_first(made, tmp_path):
    rows = made({"found": 0.8})
    write_tune(tmp_path / "out" / "log_linear_mamba2-s0", 1600, 2, 0.9)
    (tmp_path / "out" / "mamba2-s0" / "niah-400-1").mkdir()  # cut off before its test ended
    list(collect(tmp_path / "out", tmp_path / "results", "abc", tmp_path / "none"))
    tunes = read("tunes", tmp_path / "results")
    assert [(row["name"], row["steps"], row["tune_seed"]) for row in tunes] == [("log_linear_mamba2-s0", 1600, 2)]
    lines = needles.section(rows["niah"], rows["lm"], tunes).lines
    # Only 1,024 tokens are in both tests: 60 samples of the first, 40 of the second.
    assert cells(lines, "log_linear_mamba2-s0", "1,600") == ["2", "0.250", "90% ± 5"]
    assert cells(lines, "log_linear_mamba2-s0", "300") == ["0", "1.000", "80% ± 5"]
    assert sum("at 1,024 tokens together" in line for line in lines) == 1
    assert not any(line.startswith("| mamba2-s0") for line in lines)


# ---------------------------------------------------------------------------------------------------- associative recall


def recall_rows(linear: float, log_linear: float, spread: float = 0.01, state_size: int | None = None) -> list[dict]:
    rows = []
    for seed, off in enumerate((-spread, 0.0, spread)):
        rows.append(recall_row("mamba2", seed, {"4": linear + off, "16": 0.95}))
        rows.append(recall_row("log_linear_mamba2", seed, {"4": log_linear + off, "16": 0.95}))
        if state_size:
            rows.append(recall_row("mamba2", seed, {"4": 0.9 + off, "16": 0.95}, state_size))
    return [row | {"commit": "abc"} for row in rows]


@pytest.mark.parametrize(
    ("linear", "log_linear", "results", "counted"),
    [
        (0.5, 0.6, ["met", "met"], "1 of 1"),
        (0.5, 0.54, ["met", "not met"], "0 of 1"),  # 5 points are needed here
        (0.5, 0.48, ["not met", "not met"], "0 of 1"),
        (0.15, 0.15, ["met", "no such cell"], "0 of 0"),
        (0.95, 0.945, ["met", "no such cell"], "0 of 0"),  # within one standard deviation
        (0.95, 0.93, ["not met", "no such cell"], "0 of 0"),
    ],
)
def test_what_is_required_of_associative_recall(linear, log_linear, results, counted):
    section = associative.section(recall_rows(linear, log_linear))
    assert results_of(section) == results
    assert results_of(section, "Log-Linear Gated DeltaNet") == ["not run", "not run"]
    shown = f"{100 * linear:.1f} → {100 * log_linear:.1f}"
    line = cells(section.lines, "Log-Linear Mamba-2, length 256, width 16")
    assert line == [shown if "not met" not in results else f"**{shown}**", "95.0 → 95.0"]
    text = "\n".join(section.lines)
    assert f"where linear is between 20% and 90%: {counted} cells." in text
    short = f"Short: Log-Linear Mamba-2, width 16, length 256, 4 pairs ({signed(100 * (log_linear - linear), 1)} points"
    assert text.count(short) == results.count("not met")


def test_accuracies_and_equal_states():
    section = associative.section(recall_rows(0.5, 0.6, state_size=144))
    assert cells(section.lines, "Mamba-2", "16", "0.01") == ["3", "50.0 ± 1.0", "95.0 ± 0.0", "72.5 ± 0.5"]
    assert cells(section.lines, "Mamba-2", "16", "256", "144") == ["4,608", "3", "92.5 ± 0.5"]
    said = "Log-Linear Mamba-2, width 16, length 256: {} Mamba-2 with K 144"
    assert said.format("below") in "\n".join(section.lines)
    wider = associative.section(recall_rows(0.5, 0.99, state_size=144))
    assert said.format("above") in "\n".join(wider.lines)


def test_another_recipe_is_another_experiment():
    rows = recall_rows(0.5, 0.6)
    longer = json.loads(json.dumps(recall_rows(0.5, 0.3)[:2]))
    for row in longer:
        row["cell"]["recipe"]["steps"] = 99
    section = associative.section([*longer, *rows])
    assert results_of(section) == ["met", "met"]
    assert sum("10 steps" in line for line in section.lines) == sum("99 steps" in line for line in section.lines) == 1


def test_other_numbers_of_pairs_are_another_experiment():
    rows = recall_rows(0.5, 0.6)
    other = json.loads(json.dumps(rows[:2]).replace('"16"', '"12"'))
    for row in other:
        row["cell"]["pairs"] = [4, 12]
    section = associative.section([*other, *rows])
    assert results_of(section) == ["met", "met"]
    assert [line.count(" 12 pairs ") for line in section.lines if line.startswith("| model")] == [0, 1]


# -------------------------------------------------------------------------------------------------------------- the page


def test_without_rows_the_page_says_so(tmp_path):
    text = report.page(report.sections(tmp_path), {})
    assert text.count("Not run.") == 6
    assert "0 of 10 met, 10 not run." in text
    assert "](figures/" not in text


def test_notes_stand_in_their_section_and_nowhere_else(tmp_path):
    (tmp_path / "results_notes.md").write_text(
        "Preface.\n\n## Language modelling\n\nAs seen.\n\n## Needle in a haystack\n"
    )
    notes = report.read_notes(tmp_path / "results_notes.md")
    assert notes == {"language modelling": "As seen.", "needle in a haystack": ""}
    text = report.page(report.sections(tmp_path), notes)
    assert text.index("## Language modelling") < text.index("### Reading\n\nAs seen.") < text.index("## Recall on real")
    assert text.count("### Reading") == 1
    with pytest.raises(ValueError, match=r"no section \['elsewhere'\]"):
        report.page(report.sections(tmp_path), {"elsewhere": "x"})


def test_figures_are_drawn_for_what_there_is(made, tmp_path, monkeypatch):
    made({"level": -0.02, "repeats": 0.7})
    write_recall(tmp_path / "out" / "mqar" / "rows.jsonl", recall_rows(0.5, 0.6, state_size=144))
    list(collect(tmp_path / "out", tmp_path / "results", "abc", tmp_path / "out" / "mqar"))
    figures = tmp_path / "figures"
    figures.mkdir()
    (figures / "niah_gone.png").touch()
    (figures / "niah_gone.svg").touch()
    (figures / "masks.png").touch()
    titles = {}
    savefig = Figure.savefig

    def spy(figure, path, **options):
        titles[path.stem] = figure.texts[0].get_text().replace("\u00a0", " ").replace("\n", " ")
        savefig(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    drawn = set(draw_all(tmp_path / "results", figures))
    assert re.fullmatch(r"Associative recall: .* in \d+ of \d+ cells", titles["mqar"])
    assert re.search(
        r"costs log-linear models 0\.\d\d, linear models 1\.00, the Transformer 0\.\d\d nats", titles["repeats"]
    )
    assert all(title[-1] not in ".:" for title in titles.values())
    assert set(figures.iterdir()) == drawn | {figures / "masks.png"}
    text = report.page(report.sections(tmp_path / "results"), {})
    (far,) = re.findall(
        r"past position 8K against the linear twin, mean over seeds: (\S+) nats for Log-Linear",
        titles["loss_by_position"],
    )
    means = re.findall(r"^\| Log-Linear Mamba-2 − Mamba-2 \| from 8,\d+ of .* \| (\S+) \|$", text, re.M)
    assert [f"{float(mean.replace('−', '-')):.3f}".replace("-", "−") for mean in means] == [far]  # of the table
    assert {tmp_path / name for name in re.findall(r"\((figures/\w+\.svg)\)", text)} == {
        path for path in drawn if path.suffix == ".svg"
    }
    assert {path.with_suffix(".png") for path in drawn} | {path.with_suffix(".svg") for path in drawn} == drawn
    assert len(drawn) == 2 * (2 + 2 + 3 + 3)
    assert all(path.stat().st_size > 5_000 for path in drawn)


def test_the_committed_page_is_what_the_committed_rows_give():
    docs = Path(report.DOCS)
    if not any((RESULTS / f"{name}.jsonl").exists() for name in ("lm", "niah", "mqar")):
        assert not (docs / "results.md").exists()
        return
    notes = report.read_notes(docs / "results_notes.md")
    first = report.opening(said=notes.pop(report.OPENING))
    text = report.page(report.sections(), notes, first)
    assert (docs / "results.md").read_text(encoding="utf-8") == text
    assert {name for name in re.findall(r"\((figures/\w+\.svg)\)", text) if not (docs / name).exists()} == set()
    assert sum(path.stat().st_size for path in RESULTS.iterdir()) < 3 * 2**20
