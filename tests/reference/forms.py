"""The three reference forms, called alike: by the ops' argument names, heads third, groups allowed."""

import torch

from loglinear import reference
from oracle import per_value_head

GATES = ("identity", "scalar", "diagonal", "delta", "diagonal delta")


def by_heads(form):
    """``dense`` and ``recurrent`` keep heads first and know no groups; here all forms are called like the ops."""

    def call(q, k, v, level_scales, g=None, beta=None, **kwargs):
        heads = v.shape[2]
        q, k = per_value_head(q, heads).transpose(1, 2), per_value_head(k, heads).transpose(1, 2)
        v, level_scales, g, beta = (None if x is None else x.transpose(1, 2) for x in (v, level_scales, g, beta))
        transition = reference.Identity(v[..., 0]) if g is None else reference.transition_of(g, beta, k)
        return form(q, k, v, transition, level_scales, **kwargs).transpose(1, 2)

    return call


def chunkwise(q, k, v, level_scales, g=None, beta=None, chunk_size=8, **kwargs):
    g = torch.zeros_like(v[..., 0]) if g is None else g
    return reference.chunkwise(q, k, v, g, level_scales, beta, chunk_size=chunk_size, **kwargs)[0]


FORMS = {"dense": by_heads(reference.dense), "recurrent": by_heads(reference.recurrent), "chunkwise": chunkwise}
