"""MESH: the ops over the devices of a mesh, by batch, by heads and by context (one sequence over several devices).

Batch and heads need no exchange. Along the context every device folds its span of the tokens into one map (A, S). An
all-gather collects these maps; each device folds the earlier ones into the slots of the binary counter that ``scan.py``
has, and its blocks go on from there. This is the mechanism of ``loglinear.distributed``; JAX derives the exchange of
the backward pass.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from loglinear.jax import checks
from loglinear.jax.forward import block_sizes, forward
from loglinear.jax.inputs import Inputs, in_order
from loglinear.jax.layout import plain_layout
from loglinear.jax.ops import unit
from loglinear.jax.products import Numbers, numbers_of
from loglinear.jax.scan import Place, Sizes, Slots, carried, empty_slots, run
from loglinear.jax.span import Tokens, act, block_span, compose
from loglinear.jax.state import CHUNK_SIZE


def attention_over_mesh(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    level_scales: Array | None,
    scale: float | None = None,
    *,
    mesh: Mesh,
    batch: str | None = None,
    heads: str | None = None,
    context: str | None = None,
) -> Array:
    """``log_linear_attention`` without states, of whole arrays that lie on the devices of a mesh.

    Args:
        q, k, v, g, level_scales, scale: as in the op; T counts the tokens of the whole sequence.
        mesh: the devices. batch, heads, context: the axes of the mesh over which B, H and T are cut; None: every device
            has all. q and k are cut by heads with v, or, where G is 1, on every device. A device's tokens are 2^n
            chunks of 64.

    Returns:
        o ``[B, T, H, V]``, cut as v is, with gradients to all inputs.

    Raises:
        TypeError, ValueError: as the op; an axis is not one of the mesh, or does not divide what it cuts.

    Source: Guo et al. 2025, section 3; the exchange: docs/context_parallel.md.
    """
    return _over_mesh(Inputs(q, k, v, g, None, level_scales), scale, mesh, batch, heads, context)


def delta_rule_over_mesh(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    beta: Array,
    level_scales: Array | None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    mesh: Mesh,
    batch: str | None = None,
    heads: str | None = None,
    context: str | None = None,
) -> Array:
    """``log_linear_delta_rule`` in the same way. A map holds K × K numbers more for each head."""
    if beta is None:
        raise TypeError("beta must be an array [B, T, H]: got None")
    if use_qk_l2norm_in_kernel:
        q, k = unit(q, "q"), unit(k, "k")
    return _over_mesh(Inputs(q, k, v, g, beta, level_scales), scale, mesh, batch, heads, context)


def _over_mesh(
    inputs: Inputs, scale: float | None, mesh: Mesh, batch: str | None, heads: str | None, context: str | None
) -> Array:
    inputs, scale = checks.check_inputs(inputs), checks.check_scale(scale)
    groups = inputs.q.shape[2]
    cuts = {
        "batch": (batch, inputs.q.shape[0]),
        "heads": (heads, inputs.v.shape[2]),
        "context": (context, inputs.q.shape[1]),
    }
    for name, (axis, size) in cuts.items():
        if axis is not None and axis not in mesh.axis_names:
            raise ValueError(f"{name} must be an axis of the mesh, {list(mesh.axis_names)}: got {axis!r}")
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(f"{name} must divide {size} over the {mesh.shape[axis]} devices of {axis!r}: got a rest")
    if heads is not None and groups > 1 and groups % mesh.shape[heads]:
        raise ValueError(
            f"q must have one head or a multiple of {mesh.shape[heads]}, the devices of {heads!r}: got G={groups}"
        )
    if context is not None:
        own = inputs.q.shape[1] // mesh.shape[context]
        if own < CHUNK_SIZE or own & (own - 1):
            raise ValueError(f"q must hold a power of two of at least {CHUNK_SIZE} tokens on each device: got {own}")
    by_head, shared = P(batch, context, heads), P(batch, context, heads if groups > 1 else None)
    specs = Inputs(shared, shared, *(None if x is None else by_head for x in inputs[2:]))  # type: ignore[arg-type]
    ranks = 1 if context is None else mesh.shape[context]
    call = partial(_span, scale=scale, axis=context, ranks=ranks)
    return jax.shard_map(call, mesh=mesh, in_specs=(specs,), out_specs=by_head, check_vma=False)(inputs)


def _span(inputs: Inputs, scale: float, axis: str | None, ranks: int) -> Array:
    """o of the tokens of one device."""
    if axis is None or ranks == 1:
        return forward(inputs, scale, None, False, None)[0]
    rank, num, linear = lax.axis_index(axis), numbers_of(inputs.v.dtype), inputs.level_scales is None
    length = inputs.q.shape[1]
    chunk, block = block_sizes(length, 1)
    number = length // block
    blocks = inputs.blocks(number, chunk)
    maps, states = lax.all_gather(_map_of(blocks, num), axis)
    rows, (groups, heads) = inputs.q.shape[0], blocks.v.shape[2:4]
    upper = 1 if linear else (ranks - 1).bit_length()
    empty = empty_slots(rows, groups, heads, upper, (blocks.q.shape[-1], blocks.v.shape[-1]), num.wide)

    def fold(past: Slots, span: tuple[Array, Array, Array]) -> tuple[Slots, None]:
        j, map, state = span
        place = Place(j, j < 0, jnp.broadcast_to(j, (rows,)), jnp.broadcast_to(j + 1 < ranks, (rows,)))
        after = carried(past, map, state, place, linear, num)
        return jax.tree.map(lambda new, old: jnp.where(j < rank, new, old), after, past), None

    past, _ = lax.scan(fold, empty, (jnp.arange(ranks, dtype=jnp.int32), maps, states))
    lower = 0 if linear else (number - 1).bit_length()  # slots of blocks within a span: none is live at its start
    past = jax.tree.map(lambda x: jnp.pad(x, [(lower if i == 3 else 0, 0) for i in range(x.ndim)]), past)
    steps = plain_layout(rows, length, block).steps
    steps = steps._replace(number=steps.number + rank * number, whole=steps.whole.at[-1].set(False))
    out, _ = run(Sizes(num, scale), past, blocks, steps)
    return in_order(out)


def _map_of(blocks: Tokens, num: Numbers) -> tuple[Array, Array]:
    """The map of all blocks together, and what they add to a state."""

    @jax.checkpoint
    def block(x: Tokens) -> tuple[Array, Array]:
        span = block_span(x._replace(scales=None), num)  # its outputs are not used, and not computed
        return span.map, span.state

    def fold(past: tuple[Array, Array], x: Tokens) -> tuple[tuple[Array, Array], None]:
        map, state = block(x)
        exact = Numbers(num.wide, num.wide)
        matrix = map.ndim == state.ndim
        return (compose(map, past[0], matrix, exact), act(map, past[1], exact) + state), None

    first = block(jax.tree.map(lambda x: x[0], blocks))
    (map, state), _ = lax.scan(fold, first, jax.tree.map(lambda x: x[1:], blocks))
    return map, state


def exchanged_bytes(ranks: int, heads: int, key_dim: int, value_dim: int, delta_rule: bool, batch: int = 1) -> int:
    """Bytes that a device receives in the forward pass of one layer; the backward pass sends as many the other way."""
    each = heads * (key_dim * value_dim + (key_dim * key_dim if delta_rule else 1))
    return math.prod((batch, ranks - 1, each, 4))
