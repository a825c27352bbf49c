"""TRANSITION: the change that a token makes to a state before it writes, as a value that every part of a call can ask.

Ops, kernels and states ask a transition for its facts and never look at which arguments were given. The mathematics of each
stands in ``reference/transition.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Transition:
    """The facts about one kind of transition.

    Attributes:
        name: in messages. op: the public op that has it.
        gates: names of the arguments that drive it, in the order in which kernels take them.
        by_log: whether a span of tokens acts on a state by a log decay, and not by a matrix.
        keeps: whether a forward pass can leave something that spares the backward pass work.
    """

    name: str
    op: str
    gates: tuple[str, ...]
    by_log: bool
    keeps: bool


SCALAR_GATE = Transition("scalar gate", "log_linear_attention", ("g",), by_log=True, keeps=False)
DELTA_RULE = Transition("delta rule", "log_linear_delta_rule", ("g", "beta"), by_log=False, keeps=True)


def transition_of(beta: Tensor | None) -> Transition:
    """The transition that an op's arguments name."""
    return SCALAR_GATE if beta is None else DELTA_RULE
