"""Runs tests/kernels/on_device in Triton's interpreter, where there is no CUDA device; of tests/ops the linear models.

Each slow file has its own process, so slow files run side by side. The other files share one process: the imports of a
process take 4 s, longer than some of these files run.
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
# Over 20 s on one core; and memcheck, which looks into the interpreter.
ALONE = ("batches", "causality", "delta_rule_kept", "kernels", "memcheck", "prefill", "stages", "step_kernels")
PATHS = {name: FOLDER / f"test_{name}.py" for name in sorted(NAMES)}
GROUPS = {name: [PATHS[name]] for name in ALONE} | {"others": [PATHS[name] for name in PATHS if name not in ALONE]}
GROUPS["linear"] = [FOLDER.parents[1] / "ops" / "test_conformance.py", "-k", "linear_model"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same files run on the device itself")
@pytest.mark.parametrize("files", GROUPS.values(), ids=GROUPS)
def test_kernels_in_the_interpreter(files):
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-x", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
