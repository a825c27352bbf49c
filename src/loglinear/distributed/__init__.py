"""DISTRIBUTED: one sequence over the ranks of a process group, for sequences longer than one device holds.

Rank r of R holds tokens ``[r·T, (r + 1)·T)`` of a sequence of R·T, the same T on every rank, a multiple of ``CHUNK_SIZE``.
All ranks of the group call the functions here at once, each with its T tokens. All ranks also go backward through the
result. If one rank leaves out a call or its backward pass, the other ranks wait for it without end.
"""

from loglinear.distributed.context import (
    context_parallel_attention,
    context_parallel_delta_rule,
    context_span,
)
from loglinear.distributed.exchange import previous_inputs

__all__ = ["context_parallel_attention", "context_parallel_delta_rule", "context_span", "previous_inputs"]
