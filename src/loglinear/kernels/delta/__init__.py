"""DELTA RULE: log-linear attention whose transition is ``exp(g) (I - β k kᵀ)``, forward and backward, as Triton kernels.

The package has no autograd and no argument checks: ``loglinear.ops`` has both. One matrix summarises a span of tokens, its
*map* ``[A | S]`` (memory.py). Stages, in order: chunk_maps, octet_maps (once per tier), path_states, output. Backward: the
maps again if they were not kept, path_states again, path_queries, path_grads, path_state_grads, transport_grads, entry_grads,
wide_entry_grads, then octet_grads (once per tier, from the top down, with unit_grads from each to the next), score_grads,
map_grads, key_grads.
"""

from loglinear.kernels.delta.backward import backward
from loglinear.kernels.delta.forward import forward, kept_shapes

__all__ = ["backward", "forward", "kept_shapes"]
