"""DECODING: one token, or a few, against a state in fixed buffers; one launch a layer, three with the delta rule.

Special about this package: every program owns (row, head, block of columns of V) and loops over the tokens, so that no
program waits for another. What they share is read from one half of the state and written to the other (decoding_state.py).
"""

from loglinear.kernels.decoding.host import delta_step, scalar_step

__all__ = ["delta_step", "scalar_step"]
