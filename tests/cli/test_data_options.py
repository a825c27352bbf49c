"""Every command reads the same kinds of input by the same options, and finds a run's text again from its record."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import datasets
import pytest

from loglinear.cli import main
from loglinear.cli.checkpoint import check_checkpoints
from loglinear.tasks.lm.tokenizer import train_tokenizer

NIAH = ["--kinds", "number", "--contexts", "120", "--depths", "2", "--samples", "1"]


def record(run: Path) -> dict:
    return json.loads((run / "record.json").read_text())


def evaluated(run: Path, cache: Path, output: Path, *options: str) -> dict:
    assert main(["evaluate", str(run), "--cache", str(cache), "--output", str(output), *options]) == 0
    return json.loads((output / "loss_by_position.json").read_text())


def needles(run: Path, cache: Path, output: Path, *options: str) -> dict:
    assert main(["niah", "evaluate", str(run), "--cache", str(cache), "--output", str(output), *NIAH, *options]) == 0
    return json.loads((output / "niah.json").read_text())["haystack"]


def again(run: Path, cache: Path, output: Path) -> None:
    """The run is the same by its record and by its configuration."""
    assert main(["train", "--resume", str(run), "--cache", str(cache)]) == 0
    assert main(["train", "--config", str(run / "config.yaml"), "--cache", str(cache), "--output", str(output)]) == 0
    assert record(output)["arguments"] == record(run)["arguments"]
    assert record(output)["data"] == record(run)["data"]


@pytest.mark.default_packages
def test_several_names_and_a_pattern_give_one_run_that_is_found_again(texts, finished_run, train_options, tmp_path):
    cache, run = tmp_path / "cache", tmp_path / "run"
    options = [*train_options, "--steps", "1", "--cache", str(cache), "--output", str(run)]
    (tmp_path / "packed").mkdir()
    for path in sorted(texts.glob("*.txt"))[8:]:
        (tmp_path / "packed" / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    names = [f"{texts}/0[0-7].txt", str(tmp_path / "packed")]
    assert main([*options, "--data", *names]) == 0
    assert record(run)["arguments"]["data"] == names
    assert record(run)["data"] == record(finished_run)["data"], "of the same texts in one folder"
    found = evaluated(run, cache, tmp_path / "out")
    assert (found["data"], found["side"], found["hash"]) == (
        ", ".join(names),
        "validation",
        record(run)["data"]["hash"],
    )
    assert needles(run, cache, tmp_path / "out")["side"] == "validation"
    assert evaluated(run, cache, tmp_path / "out", "--data", *names, "--max-documents", "3")["documents"] == 3
    assert main([*options, "--data", *names]) == 0, "complete"
    again(run, cache, tmp_path / "again")


def test_a_streamed_run_is_found_again(texts, train_options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    cache, run = tmp_path / "cache", tmp_path / "run"
    options = [*train_options, "--steps", "1", "--cache", str(cache), "--output", str(run)]
    (tmp_path / "named").mkdir()
    rows = [path.read_text() for path in sorted(texts.glob("*.txt"))]
    datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "named" / "train.parquet")
    assert main([*options, "--data", str(tmp_path / "named"), "--streaming", "--max-documents", "10"]) == 0
    assert {"streaming": True, "max_documents": 10}.items() <= record(run)["arguments"].items()
    assert record(run)["data"]["train"]["documents"] == 8
    assert evaluated(run, cache, tmp_path / "out")["documents"] == 2
    assert needles(run, cache, tmp_path / "out")["hash"] == record(run)["data"]["hash"]
    again(run, cache, tmp_path / "again")
    assert not list((tmp_path / "arrow").rglob("*.arrow"))
    capsys.readouterr()
    assert main(["evaluate", str(run), "--cache", str(cache), "--max-documents", "3"]) == 2
    assert "--data: needed with streaming or --max-documents" in capsys.readouterr().err


@pytest.mark.default_packages
def test_records_of_runs_without_them_lack_the_newer_arguments(finished_run):
    assert not {"streaming", "max_documents"} & record(finished_run)["arguments"].keys()
    assert isinstance(record(finished_run)["arguments"]["data"], str)
    assert record(finished_run)["arguments"]["suffixes"] == [".txt", ".md", ".py", ".jsonl", ".jsonl.xz"]


COMMANDS = {
    "evaluate": ["evaluate", "RUN"],
    "generate": ["generate", "RUN", "--prompt", "alpha"],
    "niah data": ["niah", "data", "RUN", "--output", "OUT", *NIAH],
    "niah finetune": ["niah", "finetune", "RUN", "--output", "OUT", "--contexts", "120"],
    "niah evaluate": ["niah", "evaluate", "RUN", *NIAH],
}


@pytest.mark.default_packages
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("vocab_size", "message"), [(290, "must be the one that the model was trained with"), (310, "ids up to 309")]
)
def test_a_tokenizer_of_another_run_is_refused_by_every_command(
    command, vocab_size, message, finished_run, texts, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    words = [path.read_text()[::-1] for path in texts.glob("*.txt")]
    train_tokenizer([*words, "".join(map(chr, range(200, 900)))], vocab_size).save_pretrained(run)
    options = [word.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")) for word in COMMANDS[command]]
    assert main(options) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
    assert not (tmp_path / "out").exists()


@pytest.mark.default_packages
@pytest.mark.parametrize("command", ["harness", "serve"])
def test_programs_of_others_are_not_started_with_a_tokenizer_of_another_run(command, finished_run, tmp_path, capsys):
    if command == "harness":
        pytest.importorskip("lm_eval")
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished_run, run)
    train_tokenizer(["another text"], 290).save_pretrained(other)
    check_checkpoints(["--model", "hf", "--model_args", f"pretrained={run},max_length=64", str(run)])
    with pytest.raises(ValueError, match=r"run: tokenizer: must be the one that the model was trained with"):
        check_checkpoints(["--model_args", f"pretrained={run},tokenizer={other}"])
    train_tokenizer(["another text"], 290).save_pretrained(run)
    assert main([command, str(run) if command == "serve" else f"--model_args=pretrained={run}"]) == 1
    assert f"loglinear {command}: {run}: tokenizer: must be the one" in capsys.readouterr().err


@pytest.mark.default_packages
@pytest.mark.parametrize("command", ["train", "evaluate", "niah"])
def test_binary_input_is_one_line_in_every_command(command, finished_run, tmp_path, capsys):
    (tmp_path / "photo.txt").write_bytes(b"\x89PNG\r\n")
    options = {
        "train": ["--output", str(tmp_path / "run")],
        "evaluate": [str(finished_run)],
        "niah": ["evaluate", str(finished_run), *NIAH],
    }
    assert main([command, *options[command], "--data", str(tmp_path), "--cache", str(tmp_path / "cache")]) == 1
    expected = f"loglinear {command}: --data: {tmp_path}/photo.txt is not UTF-8 text: byte 0 is 0x89\n"
    assert capsys.readouterr().err == expected
