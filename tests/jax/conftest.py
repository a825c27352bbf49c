"""JAX's tests: float64, eight simulated devices, and a compiler that does not optimise."""

import os
import sys
from pathlib import Path

FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",  # a third of the time to compile (jaxlib 0.10.2)
    "--xla_force_host_platform_device_count=8",  # test_jax_mesh.py
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()  # before jax asks for a device

sys.path.append(str(Path(__file__).parents[1] / "ops"))  # calls.py

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)
