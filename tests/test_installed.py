"""The wheel in an empty environment: with the newest and the oldest packages too (`make test-newest test-oldest`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import loglinear

ROOT = Path(__file__).parents[1]
CODE = """
import json
from importlib import metadata, util

versions = {found.name.lower().replace("_", "-"): found.version for found in metadata.distributions()}
print(json.dumps([util.find_spec("loglinear").origin, versions]))
"""


def run(*command, cwd) -> str:
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=outside, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_brings_the_pinned_packages_and_no_tools_of_ours(installed, tmp_path, pytestconfig):
    """What the packages compute together is tested by the README's code, which runs here too."""
    file, versions = json.loads(run(installed / "python", "-c", CODE, cwd=tmp_path))
    assert file.startswith(str(installed.parent))
    assert versions["loglinear"] == loglinear.__version__
    assert {"torch", "transformers", "tyro", "fastapi"} < set(versions)
    assert not {"pytest", "mypy", "ruff", "pip"} & set(versions)
    pins = (ROOT / "constraints" / f"{pytestconfig.getoption('pins')}.txt").read_text(encoding="utf-8")
    pinned = {name.lower().replace("_", "-"): version for name, version in re.findall(r"^([\w-]+)==(\S+)$", pins, re.M)}
    assert {name: version.split("+")[0] for name, version in versions.items() if name in pinned} == {
        name: version for name, version in pinned.items() if name in versions
    }


def test_the_program_of_the_wheel_says_its_version(installed, tmp_path):
    assert run(installed / "loglinear", "--version", cwd=tmp_path) == f"loglinear {loglinear.__version__}\n"
