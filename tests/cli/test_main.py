"""The command line itself: help without heavy imports, and errors a user can act on."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loglinear.cli import COMMANDS, main


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    output = capsys.readouterr().out
    assert all(name in output and summary in output for name, summary in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_its_options(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"loglinear {name}" in capsys.readouterr().out


def test_help_does_not_import_what_it_does_not_need():
    check = (
        "import sys; from loglinear.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'transformers', 'datasets', 'matplotlib', 'accelerate'} & set(sys.modules)), file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert process.stderr.strip() == "[]"


def test_an_unknown_command_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["tarin"])
    assert "'tarin'" in capsys.readouterr().err


def test_the_traceback_is_kept_on_request(monkeypatch, tmp_path):
    monkeypatch.setenv("LOGLINEAR_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        main(["evaluate", str(tmp_path)])
