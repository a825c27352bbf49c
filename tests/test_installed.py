"""The wheel, installed beside the packages around this test: `make test-newest test-oldest` too run this."""

from __future__ import annotations

import json
import os
import subprocess

import loglinear

CODE = """
import json
from importlib import metadata, util
from packaging.requirements import Requirement

unmet = []
for need in map(Requirement, metadata.requires("loglinear")):
    wanted = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("models", "cli", "serve"))
    if wanted and not need.specifier.contains(metadata.version(need.name), prereleases=True):
        unmet.append(str(need))
print(json.dumps([util.find_spec("loglinear").origin, metadata.version("loglinear"), unmet]))
"""


def run(*command, cwd) -> str:
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=outside, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_is_used_and_its_requirements_are_met(installed, tmp_path):
    file, version, unmet = json.loads(run(installed / "python", "-c", CODE, cwd=tmp_path))
    assert file.startswith(str(installed.parent))
    assert version == loglinear.__version__
    assert unmet == []


def test_the_program_of_the_wheel_says_its_version(installed, tmp_path):
    assert run(installed / "loglinear", "--version", cwd=tmp_path) == f"loglinear {loglinear.__version__}\n"
