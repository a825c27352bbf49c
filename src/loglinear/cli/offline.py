"""OFFLINE: the option ``--offline`` for programs of other packages, which read variables of the environment instead."""

from __future__ import annotations

import os
from collections.abc import Sequence

OFFLINE = "ask no server for models and data sets (HF_HUB_OFFLINE=1, HF_DATASETS_OFFLINE=1)"


def offline(words: Sequence[str]) -> list[str]:
    """Obey ``--offline`` and return ``words`` without it. Call this before a library of Hugging Face is imported."""
    if "--offline" in words:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    return [word for word in words if word != "--offline"]
