"""The definition, in plain torch: five transitions, three forms. Float64-able and differentiable; the specification."""

from loglinear.reference.chunkwise import chunkwise
from loglinear.reference.dense import dense, level_mask, level_matrix
from loglinear.reference.recurrent import recurrent
from loglinear.reference.transition import DeltaRule, Diagonal, Identity, Scalar, Transition, segment_sum, transition_of

__all__ = [
    "DeltaRule",
    "Diagonal",
    "Identity",
    "Scalar",
    "Transition",
    "chunkwise",
    "dense",
    "level_mask",
    "level_matrix",
    "recurrent",
    "segment_sum",
    "transition_of",
]
