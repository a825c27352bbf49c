"""Runs tests/kernels/on_device in Triton's interpreter, where there is no GPU; and steps and two other tests of tests/ops.

Files share processes, since the imports of a process take 8 s, longer than some files run; the groups take about as long
as each other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "on_device"
NAMES = {path.stem.removeprefix("test_") for path in FOLDER.glob("test_*.py")}
SHARED = (("kernels", "memcheck"), ("causality",), ("batches", "delta_rule_kept", "stages"))
REST = tuple(sorted(NAMES - {name for names in SHARED for name in names}))
GROUPS = {" ".join(names): [FOLDER / f"test_{name}.py" for name in names] for names in (*SHARED, REST)}
OPS = FOLDER.parents[1] / "ops"
GROUPS["causality"] += [
    f"{OPS / 'test_conformance.py'}::{test}"
    for test in ("test_the_linear_model_is_lambda_one", "test_two_parts_and_a_state_are_one_pass")
]
GROUPS["batches delta_rule_kept stages"].append(OPS / "test_step_rules.py")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same files run on the device itself")
@pytest.mark.parametrize("files", GROUPS.values(), ids=GROUPS)
def test_kernels_in_the_interpreter(files):
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-x", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
