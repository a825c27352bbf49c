"""CHANNEL GATE: log-linear attention whose transition is ``diag(exp(g))``, g per key channel, as Triton kernels.

The package has no autograd and no argument checks: ``loglinear.ops`` has both. Stages, in order: scores, entries, output.
Backward: the first two again, local_grads, query_grads, entries once more, chunk_grads, key_grads, gate_grads. The first
and the last stage alone know of decays inside a chunk. Between them stand decayed queries and keys, one for each value head.
"""

from loglinear.kernels.channel.backward import backward
from loglinear.kernels.channel.forward import forward

__all__ = ["backward", "forward"]
