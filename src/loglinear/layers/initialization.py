"""The initial values of a mixer's raw parameters, and the list of parameters without weight decay.

A module *states* the initial values of the parameters that it owns, instead of writing them. ``reset_parameters``, tests and
Hugging Face's loader (which fills only the parameters that a checkpoint lacks) all use the same statement.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


class StatedInit(nn.Module, ABC):
    """A module that owns raw parameters. Their names in ``no_weight_decay`` are flagged ``_no_weight_decay = True``."""

    no_weight_decay: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def initial_values(self) -> dict[str, Tensor]:
        """Initial value of each parameter of this module itself (not of its children), by name."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Write the initial values; random values are drawn again."""
        for name, value in self.initial_values().items():
            self.get_parameter(name).copy_(value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in ``nn.Module``; loaders replace parameter objects, so the flag is set whenever one arrives."""
        super().register_parameter(name, param)
        self._flag()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A deep copy's parameters arrive here, without their flags."""
        super().__setstate__(state)
        self._flag()

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """As in ``nn.Module``; off the meta device (``to_empty``) it makes new parameters."""
        super()._apply(*args, **kwargs)
        self._flag()
        return self

    def _flag(self) -> None:
        for name, param in self._parameters.items():
            if param is not None and name in self.no_weight_decay:
                param._no_weight_decay = True  # type: ignore[attr-defined]


def initial_dt_bias(heads: int, device: torch.device, low: float = 1e-3, high: float = 1e-1) -> Tensor:
    """``[heads]`` biases b with softplus(b) log-uniform in [low, high]: each head starts with a time step of its own.

    The range is that of Mamba-2 (Dao & Gu 2024), which Gated DeltaNet takes over.
    """
    step = torch.exp(torch.empty(heads, device=device).uniform_(math.log(low), math.log(high)))
    return step + torch.log(-torch.expm1(-step))  # inverse softplus, exact for small steps


def initial_A_log(heads: int, device: torch.device, low: float, high: float) -> Tensor:
    """``[heads]`` natural logs of decay rates A, uniform in [low, high]; ``low`` > 0 keeps the log finite."""
    return torch.empty(heads, device=device).uniform_(low, high).log_()


def wide(x: Tensor) -> Tensor:
    """``x`` in the precision that gates are computed in: float32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()
