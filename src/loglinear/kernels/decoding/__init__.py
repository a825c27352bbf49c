"""DECODING: one token, or a few, against a state in fixed buffers. A layer takes one launch, or three if entries are carried.

Every program owns (row, head, block of columns of V) and loops over the tokens, so no program waits for another. Programs
read shared values from one half of the state and write them to the other half (decoding_state.py).
"""

from collections.abc import Callable
from typing import Any

from loglinear.kernels.decoding import inputs, linear_step, outputs, residual
from loglinear.kernels.decoding.host import delta_step, gate_step
from loglinear.kernels.pointwise.elementwise import silu_times
from loglinear.transition import CHANNEL_DELTA_RULE, CHANNEL_GATE, DELTA_RULE, SCALAR_GATE, Transition

STEPS: dict[Transition, Callable[..., Any]] = {
    SCALAR_GATE: gate_step,
    CHANNEL_GATE: gate_step,
    DELTA_RULE: delta_step,
    CHANNEL_DELTA_RULE: delta_step,
}

__all__ = ["STEPS", "delta_step", "gate_step", "inputs", "linear_step", "outputs", "residual", "silu_times"]
