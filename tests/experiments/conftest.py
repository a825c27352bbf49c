"""Scripts in experiments/ import each other, and benchmarks/, as they do when they are run."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / name) for name in ("experiments", "benchmarks")]
