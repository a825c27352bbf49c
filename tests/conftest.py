"""Every test starts from the same seed, on one thread, and hypothesis draws the same examples each time."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parents[1]

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")

torch.set_num_threads(1)  # tests run side by side; one core each


def pytest_collection_modifyitems(items):
    """Long tests first: no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def distributions(tmp_path_factory) -> dict[str, Path]:
    """``sdist`` and ``wheel`` of a copy of the sources: a build folder left in the tree could hide a missing file.

    The wheel is built from the sdist.
    """
    copy = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, copy)
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", copy / "dist", copy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = (copy / "dist").glob("*.tar.gz"), (copy / "dist").glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


@pytest.fixture(scope="session")
def installed(distributions, tmp_path_factory) -> Path:
    """The folder of programs of a fresh environment: our wheel is installed, and the packages around this test are seen."""
    home = tmp_path_factory.mktemp("installed")
    folder = home / sysconfig.get_path("purelib", "venv", {"base": "."})
    programs = home / sysconfig.get_path("scripts", "venv", {"base": "."})
    for command in (
        [sys.executable, "-m", "venv", "--without-pip", home],
        [sys.executable, "-m", "pip", "--python", programs / "python", "install", "-q", "--no-deps", "--no-index",
         distributions["wheel"]],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    # A path file in a folder that is itself named by a path file is not read: the checkout stays out of sight.
    (folder / "packages.pth").write_text(sysconfig.get_path("purelib") + os.linesep, encoding="utf-8")
    return programs
