"""JAX's tests: float64, and a compiler that does not optimise (half of its time)."""

import os
import sys
from pathlib import Path

FLAG = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()  # before jax asks for a device

sys.path.append(str(Path(__file__).parents[1] / "ops"))  # calls.py

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)
