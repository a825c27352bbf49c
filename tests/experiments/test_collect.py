"""From run folders to rows: what is kept, what is said to be missing, and that collecting twice changes nothing."""

from __future__ import annotations

import json
import math

import pytest
from run_folders import recall_row, write, write_recall, write_run

from collect import EXPECTED, collect, thin, without_folders
from reporting.rows import merge, read, short


@pytest.fixture
def out(tmp_path):
    write_run(tmp_path / "out", "mamba2-s0", level=0.25)
    write_run(tmp_path / "out", "log_linear_mamba2-s1")
    rows = [recall_row("mamba2", seed, {"4": 0.5}) for seed in (0, 1)]
    write_recall(tmp_path / "out" / "mqar" / "rows.jsonl", rows)
    write_recall(
        tmp_path / "out" / "mqar" / "matched" / "rows.jsonl", [*rows, recall_row("mamba2", 0, {"4": 0.9}, 144)]
    )
    return tmp_path / "out"


def test_rows_hold_what_the_report_needs(out, tmp_path):
    list(collect(out, tmp_path / "results", "abc", out / "mqar"))
    linear, log_linear = sorted(read("lm", tmp_path / "results"), key=lambda row: row["name"], reverse=True)
    assert (linear["mixer"], linear["seed"], linear["commit"], linear["gpu"]) == ("mamba2", 0, "abc", "GPU")
    assert linear["tokens"] == 300 * 4 * 2 * 16384
    assert linear["validation_perplexity"] == pytest.approx(math.exp(1.75), rel=1e-5)
    assert (linear["tokens_per_second"], linear["tokens_per_second_20_80"]) == (1e5, [1e5, 1e5])
    assert linear["memory_gib"] == 30.5
    assert set(linear["evaluations"]) == {"16384-stream", "65536-document"}
    kept = linear["evaluations"]["16384-stream"]
    assert len(kept["by_position"]) == 32
    assert [len(kept["per_sequence"]["losses"]), len(kept["per_sequence"]["losses"][0])] == [6, 16]
    assert {r["first"] for r in kept["repeats"] if r.get("repeated_tokens")} == {4096}
    assert "levels" not in linear["evaluations"]["65536-document"]
    layer = log_linear["evaluations"]["65536-document"]["levels"][1]
    assert layer["layer"] == "layers.1"
    assert layer["mean"] == pytest.approx([0.6 + 0.1 * level for level in range(6)])
    assert layer["spread"] == pytest.approx([0.1] * 6)
    assert len(read("niah", tmp_path / "results")) == 2 * 6
    assert [row["cell"]["state_size"] for row in read("mqar", tmp_path / "results")] == [144, 16, 16]
    assert len(json.dumps(linear)) < 60_000


def test_rows_hold_no_folder_of_a_machine():
    value = {"data": "/".join(["", "home", "me", "text.jsonl"]), "hashes": [{"a": "/x/y"}, "stdlib", 3], "share": "a/b"}
    assert without_folders(value) == {"data": "text.jsonl", "hashes": [{"a": "y"}, "stdlib", 3], "share": "a/b"}


def test_collecting_again_replaces_and_keeps_what_is_elsewhere(out, tmp_path):
    list(collect(out, tmp_path / "results", "abc", out / "mqar"))
    before = {path.name: path.read_text() for path in (tmp_path / "results").iterdir()}
    list(collect(out, tmp_path / "results", "abc", out / "mqar"))
    assert {path.name: path.read_text() for path in (tmp_path / "results").iterdir()} == before
    write_run(tmp_path / "more", "mamba2-s0", level=0.5)
    write_run(tmp_path / "more", "attention-s0")
    list(collect(tmp_path / "more", tmp_path / "results", "abc", tmp_path / "none"))
    found = {row["name"]: row["validation_loss"] for row in read("lm", tmp_path / "results")}
    assert found == {"mamba2-s0": 2.0, "attention-s0": 1.5, "log_linear_mamba2-s1": 1.5}
    assert len(read("niah", tmp_path / "results")) == 3 * 6
    assert len(read("mqar", tmp_path / "results")) == 3


def test_what_is_missing_is_said(out, tmp_path):
    record = json.loads((out / "mamba2-s0" / "record.json").read_text())
    write(out / "gated_deltanet-s0" / "record.json", record | {"status": "running"})
    write(out / "prepare" / "record.json", record)  # no name of a model and a seed
    (out / "mamba2-s0" / "recall" / "retrieval.json").unlink()
    (out / "mamba2-s0" / "niah" / "niah.json").unlink()
    lines = list(collect(out, tmp_path / "results", "abc", out / "mqar"))
    said = {line.partition(": ")[0]: line for line in lines}
    assert "not finished, its record says 'running'" in said["gated_deltanet-s0"]
    assert said["mamba2-s0"].endswith("; MISSING retrieval, needles")
    assert "MISSING" not in said["log_linear_mamba2-s1"]
    assert "prepare" not in said
    missing = {line.removeprefix("missing: ") for line in lines if line.startswith("missing: ")}
    assert missing == set(EXPECTED) - {"mamba2-s0", "log_linear_mamba2-s1"}
    assert len(EXPECTED) == 9
    assert read("lm", tmp_path / "results")[1]["retrieval"] is None


def test_rows_are_short(tmp_path):
    assert short({"a": [1.23456789, 12], "b": None, "c": "x"}) == {"a": [1.23457, 12], "b": None, "c": "x"}
    assert thin(list(range(1000)), 10) == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert thin([1, 2], 10) == [1, 2]
    assert merge("lm", [{"name": "a", "x": 1}, {"name": "b"}], tmp_path) == 2
    assert merge("lm", [{"name": "a", "x": 2}], tmp_path) == 2
    assert read("lm", tmp_path) == [{"name": "a", "x": 2}, {"name": "b"}]
