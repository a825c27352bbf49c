"""The activations that published mixers put behind a convolution or on an output gate, by their names in configs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "elu": lambda x: F.elu(x) + 1,  # positive, as linear attention's features
    "identity": lambda x: x,
}


def check_activation(name: str, argument: str) -> str:
    """``name``; swish is silu. Raises ValueError, which names ``argument``, for an unknown one."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{argument} must be one of {list(ACTIVATIONS)}: got {name!r}")
    return "silu" if name == "swish" else name
