"""What other systems need: text in UTF-8 whatever the machine's own encoding is, no forked processes, no opened folders."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from loglinear.tasks.lm.documents import Source
from loglinear.training import checkpoints

SOURCES = sorted((Path(__file__).parents[1] / "src" / "loglinear").rglob("*.py"))

PROGRAM = """
import multiprocessing, os, sys
from loglinear.cli import main

if __name__ == "__main__":
    del os.fork
    multiprocessing.set_start_method("spawn")
    sys.exit(any(main(command.split()) for command in sys.argv[1:]))
"""


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Every call, by the last word of what is called."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(getattr(call.func, "attr", getattr(call.func, "id", "")), call) for call in found]


def without_encoding(tree: ast.AST) -> list[int]:
    """Lines that open a text file in the encoding of the machine."""
    lines = []
    for name, call in calls(tree):
        words = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        modes = [word for word in words if word and set(word) <= set("rwaxbt+")]
        keywords = {keyword.arg for keyword in call.keywords}
        of_os = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "os"
        text = name in ("read_text", "write_text") or (name == "open" and not any("b" in mode for mode in modes))
        if text and not of_os and "encoding" not in keywords:
            lines.append(call.lineno)
    return lines


def test_the_search_finds_what_it_looks_for():
    code = "path.read_text()\nopen(x)\npath.open('rb')\npath.open('w', encoding='utf-8')\npath.write_text(t)\nos.open(p, 0)"
    assert without_encoding(ast.parse(code)) == [1, 2, 5]


def test_text_files_name_their_encoding():
    found = {path.name: without_encoding(ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_no_process_is_forked():
    for path in SOURCES:
        for name, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            assert name not in ("fork", "forkpty"), path
            if name in ("get_context", "set_start_method"):
                assert [arg.value for arg in call.args] == ["spawn"], path


def test_folders_are_not_opened_on_windows(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"1")
    opened, real = [], checkpoints.os.open
    monkeypatch.setattr(checkpoints.os, "open", lambda path, flags: opened.append((path, flags)) or real(path, flags))
    monkeypatch.setattr(checkpoints.sys, "platform", "win32")
    checkpoints._flush(tmp_path)
    checkpoints._flush(tmp_path / "file")
    assert opened == [(tmp_path / "file", checkpoints.os.O_RDWR)], "Windows flushes what is open for writing"


def test_a_path_of_windows_is_no_name_of_a_dataset():
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        list(Source("texts\\missing").documents())


@pytest.mark.slow
def test_commands_run_where_processes_are_spawned(tmp_path):
    """Without ``fork``, as on Windows and macOS: training, and the workers of associative recall."""
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "text.txt").write_text("α b c d " * 500, encoding="utf-8")
    train = "train --output run --cache cache --data text.txt --vocab-size 270 --context 16 --validation-fraction 0.2"
    train += " --steps 2 --batch-size 2 --log-every 1 --hidden-size 16 --num-hidden-layers 1 --mamba-head-dim 8"
    recall = "mqar --output recall --workers 1 --device cpu --lengths 16 --pairs 2 --widths 16 --state-size 4"
    recall += " --vocab-size 16 --steps 2 --batch-tokens 64 --seeds 0 --learning-rates 0.01"
    process = subprocess.run(
        [sys.executable, "program.py", train, recall], cwd=tmp_path, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert len((tmp_path / "recall" / "rows.jsonl").read_bytes().splitlines()) >= 2
