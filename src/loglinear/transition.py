"""TRANSITION: the change that a token makes to a state before it writes, as a value that every part of a call can ask.

Ops, kernels and states ask a transition for its facts and never look at which arguments were given. The mathematics of each
stands in ``reference/transition.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, eq=False)  # the four are compared by identity, which every call does
class Transition:
    """The facts about one kind of transition.

    Attributes:
        name: in messages. op: the public op that has it.
        gates: names of the arguments that drive it, in the order in which kernels take them.
        per_channel: whether g has a value for each key channel, ``[B, T, H, K]``, and not one for each head.
        span: what a span of tokens does to a state: "log", a decay of one log for each head; "logs", one for each key channel;
            "matrix", a matrix ``[K, K]``.
        keeps: whether a forward pass can leave something that spares the backward pass work.
    """

    name: str
    op: str
    gates: tuple[str, ...]
    per_channel: bool
    span: Literal["log", "logs", "matrix"]
    keeps: bool = False

    @property
    def by_log(self) -> bool:
        """Whether a state moves through time by an addition to its one log, and stays as it is."""
        return self.span == "log"


_ATTENTION, _DELTA = ("log_linear_attention", ("g",)), ("log_linear_delta_rule", ("g", "beta"))
SCALAR_GATE = Transition("scalar gate", *_ATTENTION, per_channel=False, span="log", keeps=True)
CHANNEL_GATE = Transition("gate per channel", *_ATTENTION, per_channel=True, span="logs")
DELTA_RULE = Transition("delta rule", *_DELTA, per_channel=False, span="matrix", keeps=True)
CHANNEL_DELTA_RULE = Transition(
    "delta rule with a gate per channel", *_DELTA, per_channel=True, span="matrix", keeps=True
)


def transition_of(delta_rule: bool, per_channel: bool) -> Transition:
    """The transition with these two properties."""
    if delta_rule:
        return CHANNEL_DELTA_RULE if per_channel else DELTA_RULE
    return CHANNEL_GATE if per_channel else SCALAR_GATE


def is_per_channel(g: Tensor | None) -> bool:
    """Whether a gate, of an op ``[B, T, H]`` or ``[B, T, H, K]``, has a value for each key channel."""
    return isinstance(g, Tensor) and g.dim() == 4
