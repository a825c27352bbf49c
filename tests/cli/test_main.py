"""The command line itself: help without heavy imports, and errors a user can act on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

import loglinear
from loglinear.cli import COMMANDS, PROGRAMS, main
from loglinear.cli.errors import as_typed


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    output = capsys.readouterr().out
    assert all(name in output and summary in output for name, summary in COMMANDS.items())


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - set(PROGRAMS)))
def test_every_command_explains_its_options(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"loglinear {name}" in capsys.readouterr().out


@pytest.mark.default_packages
@pytest.mark.parametrize("module", ["loglinear", "loglinear.cli"])
def test_the_version_is_that_of_the_package(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"loglinear {loglinear.__version__}\n"


@pytest.mark.default_packages
def test_help_does_not_import_what_it_does_not_need():
    check = (
        "import sys; from loglinear.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'transformers', 'datasets', 'matplotlib', 'accelerate'} & set(sys.modules)), file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert process.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("options", "status", "line"),
    [
        (["tarin"], 2, r"loglinear: argument COMMAND: invalid choice: 'tarin' .*'train'.*"),
        ([], 2, "loglinear: the following arguments are required: COMMAND"),
        (["train"], 2, "loglinear train: .*--output PATH"),
        (["train", "--output", "run", "--steps", "ten"], 2, "loglinear train: --steps: .*'ten'"),
        (["train", "--output", "run", "--batch-sise", "3"], 2, ".*--batch-sise, 3; did you mean --batch-size[?]"),
        (["train", "--output", "run", "--packing", "dense"], 2, ".*'dense'.*'--packing'.*'stream', 'document'.*"),
        (
            ["train", "--output", "run", "--batch-size", "0"],
            2,
            "loglinear train: --batch-size must be at least 1: got 0",
        ),
        (
            ["train", "--output", "run", "--save-every", "5"],
            2,
            ".*: --save-every must be a multiple of --log-every: .*",
        ),
        (
            ["train", "--output", "run", "--data", f"./none/{'a' * 100}/data.txt"],
            1,
            f".*--data: .*'./none/{'a' * 100}/data.*",
        ),
        (["niah"], 2, "loglinear niah: .*data, finetune, evaluate.*"),
        (["niah", "data", "run", "--output", "file", "--samples", "0"], 2, "loglinear niah: --samples must be .*"),
        (["masks", "--tokens", "1"], 2, "loglinear masks: --tokens must be 2 to 256: got 1"),
        (["mqar", "--batch-tokens", "0"], 2, "loglinear mqar: --batch-tokens must be at least 1: got 0"),
        (["evaluate", "./nowhere"], 1, "loglinear evaluate: checkpoint: nowhere holds no model .*"),
    ],
)
def test_an_error_is_one_line_with_the_option_as_typed(options, status, line, capsys):
    assert main(options) == status
    captured = capsys.readouterr()
    assert re.fullmatch(line, captured.err.removesuffix("\n")), captured.err
    assert captured.out == ""


def test_words_that_are_no_options_stay():
    names = {"data", "batch_size", "text_field", "context"}
    for message, wanted in {
        "data: './batch_size/x' holds no batch_size": "--data: './batch_size/x' holds no --batch-size",
        "training data: context must be at most 3": "training data: --context must be at most 3",
        "the text behind data, or batch_size=3": "the text behind data, or --batch-size=3",
        "output: no batch_size.txt": "output: no batch_size.txt",
    }.items():
        assert as_typed(message, names) == wanted


@pytest.mark.default_packages
@pytest.mark.parametrize("options", [["train", "--help"], ["masks", "--output", "{folder}"], ["--help"]], ids=str)
def test_output_that_nobody_reads_is_no_error(options, tmp_path):
    """As ``| head`` does when it has seen enough: here before the first line."""
    command = [option.format(folder=tmp_path) for option in options]
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "loglinear.cli", *command], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert process.stderr == ""
    assert process.returncode == (0 if options == ["--help"] else 141)  # argparse has swallowed it


@pytest.mark.parametrize(("number", "status", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_ends_a_command_in_one_line(number, status, word, monkeypatch, capsys):
    def stop_here(args):
        signal.raise_signal(getattr(signal, number))

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("loglinear.cli.masks.masks", stop_here)
    of_parent = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        assert main(["masks"]) == status
    finally:
        signal.signal(signal.SIGINT, of_parent)
    assert capsys.readouterr().err == f"loglinear masks: {word}\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_traceback_is_kept_on_request(monkeypatch, tmp_path):
    monkeypatch.setenv("LOGLINEAR_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        main(["evaluate", str(tmp_path)])
