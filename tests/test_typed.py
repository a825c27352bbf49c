"""py.typed keeps its word: type checkers pass a right program that uses the wheel, and report every mistake of a wrong one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "tests" / "typed"

# What `mypy --strict` adds to our settings. It is for the programs alone, so that the cache of `make lint` serves for torch.
STRICT = """
[[tool.mypy.overrides]]
module = ["right", "wrong"]
disallow_any_generics = true
disallow_subclassing_any = true
disallow_untyped_calls = true
disallow_untyped_defs = true
disallow_incomplete_defs = true
disallow_untyped_decorators = true
warn_unused_ignores = true
warn_return_any = true
strict_equality = true
extra_checks = true
"""

pytestmark = pytest.mark.slow


def mistakes() -> set[tuple[str, int]]:
    """The lines of wrong.py that say so."""
    lines = (PROGRAMS / "wrong.py").read_text(encoding="utf-8").splitlines()
    return {("wrong.py", number) for number, line in enumerate(lines, 1) if "# wrong: " in line}


@pytest.fixture
def errors(installed, tmp_path):
    """A function: the file and the line of every error that a checker finds in copies of both programs."""
    for name in ("right.py", "wrong.py"):
        shutil.copy(PROGRAMS / name, tmp_path)
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    outside["PATH"] = f"{installed}{os.pathsep}{os.environ['PATH']}"

    def check(*command: object) -> set[tuple[str, int]]:
        words = [sys.executable, "-m", *map(str, command), "right.py", "wrong.py"]
        done = subprocess.run(words, cwd=tmp_path, env=outside, capture_output=True, text=True, timeout=280)
        print(done.stdout, done.stderr)
        found = re.findall(r"(\w+\.py):(\d+)(?::\d+ -|:) error:", done.stdout)
        return {(name, int(line)) for name, line in found}

    return check


def test_mypy_strict(installed, errors, tmp_path):
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(settings + STRICT, encoding="utf-8")
    if (ROOT / ".mypy_cache").exists():
        shutil.copytree(ROOT / ".mypy_cache", tmp_path / ".mypy_cache")
    assert errors("mypy", "--python-executable", installed / "python") == mistakes()


def test_pyright(installed, errors):
    """basedpyright: pyright as a package of the registry."""
    assert errors("basedpyright", "--pythonpath", installed / "python", "--level", "error") == mistakes()
