"""JAX's tests: float64, eight simulated devices, and a compiler that does not optimise.

``JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false pytest tests/jax/test_jax_foreign.py`` runs on a GPU.
"""

import os
import sys
from pathlib import Path

FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",  # a third of the time to compile (jaxlib 0.10.2)
    "--xla_force_host_platform_device_count=8",  # test_jax_mesh.py
)
# Before jax asks for a device.
if "cuda" not in os.environ.get("JAX_PLATFORMS", ""):
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()

sys.path.append(str(Path(__file__).parents[1] / "ops"))  # calls.py

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)
