"""SCALAR GATE: log-linear attention whose transition is ``exp(g)``, forward and backward, as Triton kernels.

The package has no autograd and no argument checks: ``loglinear.ops`` has both. Stages, in order:
chunk_states, node_states, output. Backward: the states again, local_grads, query_grads, node_grads, chunk_grads, value_grads,
key_grads, gate_grads.
"""

from loglinear.kernels.decay.backward import backward
from loglinear.kernels.decay.forward import forward, kept_shapes

__all__ = ["backward", "forward", "kept_shapes"]
