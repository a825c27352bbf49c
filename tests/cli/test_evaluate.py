"""`loglinear evaluate`: the loss of the right text, and numbers that agree with each other."""

from __future__ import annotations

import json

import numpy as np
import pytest

from loglinear.cli import main


@pytest.fixture
def evaluate(finished_run, train_options, tmp_path):
    """Evaluate with some options, and return what loglinear wrote."""
    cache = train_options[train_options.index("--cache") + 1]

    def run(*options: str, checkpoint=finished_run) -> dict:
        command = ["evaluate", str(checkpoint), "--cache", cache, "--output", str(tmp_path / "out"), *options]
        assert main(command) == 0
        return json.loads((tmp_path / "out" / "loss_by_position.json").read_text())

    return run


def test_without_data_it_is_the_validation_of_the_run(evaluate, finished_run, tmp_path):
    result = evaluate()
    metrics = json.loads((finished_run / "record.json").read_text())["metrics"]
    assert result["loss"] == pytest.approx(metrics["validation_loss"], rel=1e-5)
    assert result["perplexity"] == pytest.approx(metrics["validation_perplexity"], rel=1e-5)
    assert result["side"] == "validation"
    assert (tmp_path / "out" / "loss_by_position.png").stat().st_size > 10_000


@pytest.mark.default_packages
def test_the_curve_averages_to_the_loss(evaluate):
    result = evaluate("--buckets", "5")
    rows = result["by_position"]
    widths = [row["last"] - row["first"] + 1 for row in rows]
    assert len(rows) == 5
    assert sum(widths) == result["context"] - 1
    assert np.average([row["loss"] for row in rows], weights=widths) == pytest.approx(result["loss"], rel=1e-6)


@pytest.mark.default_packages
def test_the_training_data_given_by_name_is_still_split(evaluate, texts):
    by_name = evaluate("--data", str(texts))
    assert by_name["side"] == "validation"
    assert by_name["loss"] == evaluate()["loss"]
    assert evaluate("--data", str(texts), "--split", "all")["documents"] == 15


@pytest.mark.default_packages
def test_other_text_is_used_whole_at_any_context(evaluate, tmp_path):
    lines = [json.dumps({"body": "alpha beta gamma plus delta " * 30}) for _ in range(4)]
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    other = ["--data", str(tmp_path / "other.jsonl"), "--text-field", "body"]
    result = evaluate(*other, "--context", "100", "--packing", "document")
    assert (result["side"], result["documents"], result["context"]) == ("all", 4, 100)
    assert result["tokens"] == 100 * result["sequences"] + result["tail_tokens"]
    thinned = evaluate(*other, "--sequences", "3")
    assert thinned["predictions"] == 3 * 31


@pytest.mark.default_packages
def test_a_checkpoint_inside_a_run_is_evaluated_itself(evaluate, finished_run):
    history = json.loads((finished_run / "record.json").read_text())["history"]
    final = evaluate(checkpoint=finished_run / "checkpoint-12")
    earlier = evaluate(checkpoint=finished_run / "checkpoint-8")
    logged = {log["step"]: log["eval_loss"] for log in history if "eval_loss" in log}
    assert final["loss"] == pytest.approx(logged[12], rel=1e-5)
    assert logged[12] < earlier["loss"] < logged[6]


@pytest.mark.default_packages
def test_text_that_is_no_longer_there_is_named(finished_run, texts, tmp_path, capsys):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    record = json.loads((run / "record.json").read_text())
    shutil.copytree(texts, tmp_path / "texts")
    (tmp_path / "texts" / "new.txt").write_text("more text")
    record["arguments"]["data"] = str(tmp_path / "texts")
    (run / "record.json").write_text(json.dumps(record))
    assert main(["evaluate", str(run), "--cache", str(tmp_path / "cache")]) == 1
    assert "is no longer what the model was trained on" in capsys.readouterr().err


@pytest.mark.default_packages
def test_a_model_without_a_record_needs_data(finished_run, tmp_path, capsys):
    import shutil

    shutil.copytree(finished_run / "checkpoint-12", tmp_path / "alone")
    assert main(["evaluate", str(tmp_path / "alone")]) == 2
    assert "data: needed, because no record" in capsys.readouterr().err


@pytest.mark.default_packages
def test_measures_of_other_sequences_do_not_stay(evaluate, tmp_path):
    evaluate("--measures", "levels")
    evaluate()
    assert (tmp_path / "out" / "levels.json").exists(), "of the same sequences"
    evaluate("--context", "16")
    assert not list((tmp_path / "out").glob("levels.*"))


@pytest.mark.default_packages
@pytest.mark.parametrize("option", ["batch_size", "buckets", "context", "sequences"])
def test_counts_that_make_no_sense_are_named(option, finished_run, capsys):
    option = f"--{option.replace('_', '-')}"
    assert main(["evaluate", str(finished_run), option, "0"]) == 2
    assert capsys.readouterr().err.startswith(f"loglinear evaluate: {option} must be at least")


@pytest.mark.default_packages
def test_a_folder_that_cannot_be_written_is_named(finished_run, train_options, tmp_path, capsys):
    (tmp_path / "file").touch()
    cache = train_options[train_options.index("--cache") + 1]
    assert main(["evaluate", str(finished_run), "--cache", cache, "--output", str(tmp_path / "file")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err
