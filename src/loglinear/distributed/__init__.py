"""DISTRIBUTED: one sequence over the ranks of a process group, for sequences longer than one device holds.

Rank r of R holds tokens ``[r·T, (r + 1)·T)`` of a sequence of R·T, the same T on every rank, a multiple of ``CHUNK_SIZE``. The
functions here are called with these T tokens by all ranks of the group at once, and by their backward passes too: a rank that
leaves a call out, or takes no backward pass through it, leaves the others waiting.
"""

from loglinear.distributed.context import (
    context_parallel_attention,
    context_parallel_delta_rule,
    context_span,
)
from loglinear.distributed.exchange import previous_inputs

__all__ = ["context_parallel_attention", "context_parallel_delta_rule", "context_span", "previous_inputs"]
