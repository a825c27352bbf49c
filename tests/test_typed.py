"""py.typed keeps its word: type checkers pass a right program that uses the wheel, and report every mistake of a wrong one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
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


@pytest.fixture(scope="module")
def programs(distributions, tmp_path_factory) -> Path:
    """The folder of programs of an environment that holds the wheel and sees the packages around this test.

    The caches of the checkers know these packages.
    """
    home = tmp_path_factory.mktemp("typed")
    folder = home / sysconfig.get_path("purelib", "venv", {"base": "."})
    found = home / sysconfig.get_path("scripts", "venv", {"base": "."})
    for words in (["venv", "-q", "--no-project", "--python", sys.executable, home],
                  ["pip", "install", "-q", "--python", home, "--no-deps", "--offline", distributions["wheel"]]):  # fmt: skip
        subprocess.run([sys.executable, "-m", "uv", *map(str, words)], check=True, timeout=120)
    # A path file in a folder that is itself named by a path file is not read: the checkout stays out of sight.
    (folder / "packages.pth").write_text(sysconfig.get_path("purelib") + os.linesep, encoding="utf-8")
    return found


@pytest.fixture
def errors(programs, tmp_path):
    """A function: the file and the line of every error that a checker finds in copies of both programs."""
    for name in ("right.py", "wrong.py"):
        shutil.copy(PROGRAMS / name, tmp_path)
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    outside["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"

    def check(*command: object) -> set[tuple[str, int]]:
        words = [sys.executable, "-m", *map(str, command), "right.py", "wrong.py"]
        done = subprocess.run(words, cwd=tmp_path, env=outside, capture_output=True, text=True, timeout=280)
        print(done.stdout, done.stderr)
        found = re.findall(r"(\w+\.py):(\d+)(?::\d+ -|:) error:", done.stdout)
        return {(name, int(line)) for name, line in found}

    return check


def test_mypy_strict(programs, errors, tmp_path):
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(settings + STRICT, encoding="utf-8")
    if (ROOT / ".mypy_cache").exists():
        shutil.copytree(ROOT / ".mypy_cache", tmp_path / ".mypy_cache")
    assert errors("mypy", "--python-executable", programs / "python") == mistakes()


def test_pyright(programs, errors):
    """basedpyright: pyright as a package of the registry."""
    assert errors("basedpyright", "--pythonpath", programs / "python", "--level", "error") == mistakes()
