"""The site, built once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def site(once) -> Path:
    """Its folder, built strictly: a broken link, a lost anchor or a page without a place in the navigation is an error.

    Without mkdocs tests are skipped; CI must have it.
    """
    if "CI" not in os.environ:
        pytest.importorskip("mkdocs", reason="needs pip install '.[docs]'")
    return once("site", build)


def build(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
