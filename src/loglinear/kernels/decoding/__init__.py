"""DECODING: one token, or a few, against a state in fixed buffers. A layer takes one launch, or three if entries are carried.

Every program owns (row, head, block of columns of V) and loops over the tokens, so no program waits for another. Programs
read shared values from one half of the state and write them to the other half (decoding_state.py).
"""

from loglinear.kernels.decoding import inputs, linear_step, outputs, residual
from loglinear.kernels.decoding.host import step
from loglinear.kernels.pointwise.elementwise import silu_times

__all__ = ["inputs", "linear_step", "outputs", "residual", "silu_times", "step"]
