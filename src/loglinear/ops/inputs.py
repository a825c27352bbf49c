"""INPUTS: the tensors of one call as one value, with its transition, and the call itself.

Its facts are methods: PyTorch 2.8 does not compile properties of a named tuple.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from loglinear.state import LinearState, LogLinearState
from loglinear.transition import Transition, is_per_channel, transition_of

Backend = Literal["auto", "triton", "torch"]
State = LogLinearState | LinearState


class Inputs(NamedTuple):
    """The tensors of a call, in the order of the operator: q, k ``[B, T, G, K]``, v ``[B, T, H, V]``, g ``[B, T, H]`` or
    ``[B, T, H, K]``, beta ``[B, T, H]``, λ ``[B, T, H, L]``; None where there is none."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    level_scales: Tensor | None

    def transition(self) -> Transition:
        """The change of a state by a token, before the token writes."""
        return transition_of(self.beta is not None, is_per_channel(self.g))

    def gates(self) -> tuple[Tensor | None, ...]:
        """The arguments that drive the transition, as its kernels take them."""
        return tuple(getattr(self, name) for name in self.transition().gates)

    def linear(self) -> bool:
        """Whether there is no tree: the linear model, with one state of fixed size."""
        return self.level_scales is None

    def each(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The function of each tensor."""
        return Inputs(*(None if x is None else function(x) for x in self))  # type: ignore[arg-type]

    def part(self, rows: slice, tokens: slice) -> Inputs:
        """Some rows and tokens of all."""
        return self.each(lambda x: x[rows, tokens])

    def extended(self, before: int, after: int, **given: Tensor) -> Inputs:
        """With ``before`` and ``after`` tokens of zeros: they write, forget and ask nothing. λ is 1 there."""

        def padded(name: str, x: Tensor | None) -> Tensor | None:
            if x is None or name in given:
                return given.get(name)
            sizes = (*(0, 0) * (x.dim() - 2), before, after)
            return F.pad(x, sizes, value=1.0 if name == "level_scales" else 0.0)

        return Inputs(*(padded(name, x) for name, x in zip(self._fields, self)))  # type: ignore[arg-type]


class Call(NamedTuple):
    """A call of either public op, with the meanings of the arguments there.

    taken: the backends with which kernels have taken a call of this kind (``checks.check_inputs``); None if nobody asks.
    """

    inputs: Inputs
    scale: float = 1.0
    state: State | None = None
    output_final_state: bool = False
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None
    backend: Backend = "auto"
    taken: set[Backend] | None = None
