"""`loglinear niah` and the further measures of `loglinear evaluate`: from a run to samples, a tuned model and numbers."""

from __future__ import annotations

import json
import shutil

import pytest

from loglinear.cli import main

GRID = ["--contexts", "600", "700", "--depths", "2", "--samples", "2"]


@pytest.fixture
def cache(train_options) -> list[str]:
    at = train_options.index("--cache")
    return train_options[at : at + 2]


@pytest.mark.default_packages
def test_data_are_the_samples_of_the_test(finished_run, cache, tmp_path):
    command = ["niah", "data", str(finished_run), "--output", str(tmp_path / "new" / "s.jsonl"), *GRID, *cache]
    assert main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "new" / "s.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 4 * 2 * 2
    for row in rows:
        assert len(row["input_ids"]) == row["context"]
        assert all(value in row["prompt"] and value in row["answer"] for value in row["values"])
        assert row["prompt"].endswith((f"{row['key']} is", f"{row['key']} are"))
    words = {"alpha", "beta", "gamma", "delta"}
    assert words & set(rows[0]["prompt"].split())  # the haystack is the text of the run


def test_a_run_is_tuned_and_tested(finished_run, cache, tmp_path, capsys):
    tuned = tmp_path / "tuned"
    options = ["--kinds", "number", "word", *cache]
    tune = ["--contexts", "128", "256", "--steps", "4", "--batch-tokens", "512", "--log-every", "2"]
    command = ["niah", "finetune", str(finished_run), "--output", str(tuned), *tune, *options]
    assert main(command) == 0
    record = json.loads((tuned / "record.json").read_text())
    assert record["arguments"] == json.loads((finished_run / "record.json").read_text())["arguments"]
    assert [entry["step"] for entry in record["niah"]["history"]] == [2, 4]
    assert record["niah"]["haystack"]["side"] == "train"
    assert main(command) == 1
    assert "holds a run already" in capsys.readouterr().err

    grid = ["--contexts", "128", "512", "--depths", "2", "--samples", "2"]
    assert main(["niah", "evaluate", str(tuned), "--batch-tokens", "512", *grid, *options]) == 0
    result = json.loads((tuned / "evaluation" / "niah.json").read_text())
    assert result["haystack"]["side"] == "validation"
    assert result["tuned_contexts"] == [128, 256]
    assert len(result["cells"]) == 2 * 2 * 2
    assert {row["samples"] for row in result["by_context"]} == {4}
    assert (tuned / "evaluation" / "niah.png").stat().st_size > 10_000
    # The tuned model is a checkpoint like any other.
    assert main(["evaluate", str(tuned), *cache]) == 0


@pytest.mark.default_packages
def test_without_a_record_the_text_must_be_given(finished_run, texts, cache, tmp_path, capsys):
    import shutil

    shutil.copytree(finished_run / "checkpoint-12", tmp_path / "alone")
    command = ["niah", "evaluate", str(tmp_path / "alone"), "--contexts", "400", "--depths", "2", "--samples", "1"]
    assert main([*command, *cache]) == 2
    assert "data: needed, because no record" in capsys.readouterr().err
    assert main([*command, *cache, "--data", str(texts), "--kinds", "word"]) == 0


@pytest.mark.default_packages
def test_evaluate_measures_recall(finished_run, cache, tmp_path):
    for i in range(12):
        text = f"#define NAME_{i} 0x{i}{i}\n" + "alpha beta gamma (delta)\n" * 20
        (tmp_path / f"{i:02}.txt").write_text(text)
    measures = ["--measures", "repeats", "retrieval", "levels", "--distances", "100", "200", "--questions", "3"]
    options = ["--data", str(tmp_path), "--context", "96", *measures, "--output", str(tmp_path / "out"), *cache]
    assert main(["evaluate", str(finished_run), *options]) == 0
    rows = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text())["rows"] for name in measures[1:4]}
    numbers = json.loads((tmp_path / "out" / "loss_by_position.json").read_text())
    assert sum(row["tokens"] for row in rows["repeats"]) == numbers["predictions"]
    assert [(row["distance"], row["questions"]) for row in rows["retrieval"]] == [(100, 3), (200, 3)]
    assert [len(row["heads"]) for row in rows["levels"]] == [4]
    assert all((tmp_path / "out" / f"{name}.png").stat().st_size > 5_000 for name in rows)


@pytest.mark.default_packages
@pytest.mark.parametrize("changed", ["data", "fraction"])
def test_text_that_the_model_may_have_seen_is_refused(changed, finished_run, texts, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    record = json.loads((run / "record.json").read_text())
    shutil.copytree(texts, tmp_path / "texts")
    record["arguments"]["data"] = str(tmp_path / "texts")
    if changed == "data":
        (tmp_path / "texts" / "new.txt").write_text("more text")
    else:
        record["arguments"]["validation_fraction"] = 0.0
    (run / "record.json").write_text(json.dumps(record))
    status = {"data": 1, "fraction": 2}[changed]
    assert main(["niah", "evaluate", str(run), "--cache", str(tmp_path / "cache"), *GRID]) == status
    wanted = {"data": "no longer what the model was trained on", "fraction": "trained on all of its text"}
    assert wanted[changed] in capsys.readouterr().err
