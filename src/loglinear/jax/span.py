"""SPAN: a block of tokens as one affine map of the state, by halving.

A block is ``2**u`` chunks, a chunk is C tokens, both aligned to the positions of their sequence. Inside a chunk the
output is masked attention. Above it neighbours merge level by level: the right half reads the state of the left half,
and the two become one span.

Axes: p rows, g groups of q and k, r value heads of a group, n spans, t tokens of a span, k, v widths, l levels. Queries
    are rows and
a log weight: ``exp(weight) · rows``. With a gate for each head the weight carries the decay, so that q and k stay
shared by the heads of a group. The other transitions have a query for each head; there r is 1, and the rows carry the
decay.

Every log here is a sum of gates over the tokens that it spans, built by additions; no two sums are ever subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from loglinear.jax.products import Numbers, einsum

# Logs below this are a decay to zero, also in float64, whose exp ends at -745; -inf would turn 0 · log into NaN.
LEAST_LOG = -1e3


class Tokens(NamedTuple):
    """The chunks of one block of each row: q, k ``[p, g, n, C, K]``, v ``[p, g, r, n, C, V]``, gate ``[p, g, r, n, C]`` or
    ``[p, g, 1, n, C, K]``, beta ``[p, g, r, n, C]`` or None, scales λ ``[p, g, r, n, C, L]`` or None.
    """

    q: Array
    k: Array
    v: Array
    gate: Array
    beta: Array | None
    scales: Array | None


class Spans(NamedTuple):
    """n spans side by side: query rows ``[p, g, n, t, K]`` seen from the start of their span, their log weight
    ``[p, g, r, n, t]`` or None, the span's map (log ``[p, g, r, n]``, logs ``[p, g, 1, n, K]`` or matrix
    ``[p, g, 1, n, K, K]``), what it adds ``[p, g, r, n, K, V]``, and the output so far ``[p, g, r, n, t, V]``.
    """

    rows: Array
    weight: Array | None
    map: Array
    state: Array
    out: Array


# ------------------------------------------------------------------------------------------------- one chunk


class Levels(NamedTuple):
    """The tree inside a chunk of C tokens, as constants: ``pairs [l, t, s]`` is 1 where token t sees token s at level
    l; ``rows [l, t, r]`` where token r lies between the start of t's half of its node of ``2**l`` tokens and t;
    ``columns [l, s, r]`` where r lies behind s in the half of s. At level l the log decay from s to t is therefore
    ``rows[l, t] @ g + columns[l, s] @ g``.
    """

    pairs: np.ndarray
    rows: np.ndarray
    columns: np.ndarray


@lru_cache
def levels_of(size: int) -> Levels:
    """For C = ``size``, a power of two."""
    t, s = np.arange(size)[:, None], np.arange(size)
    level = np.where(t >= s, np.frompyfunc(int.bit_length, 1, 1)(t ^ s).astype(int), -1)
    half = np.maximum(np.arange(size.bit_length()) - 1, 0)[:, None, None]
    inside = (t >> half == s >> half) & (half >= 0) & (np.arange(size.bit_length()) > 0)[:, None, None]
    pairs = level == np.arange(size.bit_length())[:, None, None]
    return Levels(
        pairs.astype(np.float32), (inside & (s <= t)).astype(np.float32), (inside & (s > t)).astype(np.float32)
    )


def by_level(pairs: np.ndarray, each: Array) -> Array:
    """``[..., l, t, s] -> [..., t, s]``: at each pair the value of its level; 0 where t does not see s."""
    return (pairs.astype(each.dtype) * each).sum(-3)


def weigh(scores: Array, scales: Array, size: int) -> Array:
    """Scores ``[..., t, s]`` of a chunk of ``size`` tokens times λ ``[..., t, L]`` of the level of each pair."""
    return _weigh(size, scores, in_chunk(scales, size.bit_length()))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weigh(size: int, scores: Array, scales: Array) -> Array:
    return scores * _of_pairs(size, scales)


def _of_pairs(size: int, scales: Array) -> Array:
    return by_level(levels_of(size).pairs, jnp.swapaxes(scales, -1, -2)[..., None])


def _weigh_forward(size: int, scores: Array, scales: Array) -> tuple[Array, tuple[Array, Array]]:
    return _weigh(size, scores, scales), (scores, scales)


def _weigh_backward(size: int, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """The gradient of λ is a product with the pairs of each level, and no sum over arrays of all levels."""
    scores, scales = kept
    by_pair = jnp.asarray(levels_of(size).pairs, scores.dtype)
    return gradient * _of_pairs(size, scales), _exact("lts,...ts->...tl", by_pair, scores * gradient)


_weigh.defvjp(_weigh_forward, _weigh_backward)


def in_chunk(scales: Array, levels: int) -> Array:
    """λ ``[..., L]`` of so many levels; those past the last share its λ."""
    return scales[..., np.minimum(np.arange(levels), scales.shape[-1] - 1)]


@dataclass(frozen=True)
class Gate:
    """The decays inside a chunk, of logs ``gate [..., t]``, or ``[..., t, k]`` of each channel; both at least
    ``LEAST_LOG``.
    """

    gate: Array
    per_channel: bool
    num: Numbers

    @property
    def levels(self) -> Levels:
        return levels_of(self.gate.shape[-2 if self.per_channel else -1])

    def _sums(self, which: np.ndarray) -> Array:
        return self.num.exact(
            "ltr,...rk->...ltk" if self.per_channel else "ltr,...r->...lt", jnp.asarray(which), self.gate
        )

    def _sum(self, which: np.ndarray) -> Array:
        return self.num.exact("tr,...rk->...tk" if self.per_channel else "tr,...r->...t", jnp.asarray(which), self.gate)

    def from_start(self) -> Array:
        """Log decay from the start of the chunk through each token."""
        size = self.levels.pairs.shape[1]
        return self._sum(np.tril(np.ones((size, size), np.float32)))

    def to_end(self) -> Array:
        """Log decay from after each token to the end."""
        size = self.levels.pairs.shape[1]
        return self._sum(np.triu(np.ones((size, size), np.float32), 1))

    def decays(self) -> Array:
        """Decay ``[..., t, s]`` from token s to token t, of a gate for each head; 0 where t does not see s."""
        return decays_of(self.gate, self.num)

    def scores(self, q: Array, k: Array) -> Array:
        """``Σ_k q_t exp(g_{s+1} + … + g_t) k_s`` per channel: a product for each level of the chunk. q, k
        ``[..., t, k]``.
        """
        pairs, rows, columns = self.levels
        q, k = (x[..., None, :, :] * jnp.exp(self._sums(y)) for x, y in ((q, rows), (k, columns)))
        return by_level(pairs, self.num.product("...ltk,...lsk->...lts", q, k))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def decays_of(gate: Array, num: Numbers) -> Array:
    """``Gate.decays``, with the derivative of a difference of sums: a gate decays the pairs on whose two sides it stands."""
    pairs, rows, columns = levels_of(gate.shape[-1])
    sums = [num.exact("ltr,...r->...lt", jnp.asarray(which), gate) for which in (rows, columns)]
    return pairs.sum(0) * jnp.exp(by_level(pairs, sums[0][..., None] + sums[1][..., None, :]))


def _decays_forward(gate: Array, num: Numbers) -> tuple[Array, Array]:
    decay = decays_of(gate, num)
    return decay, decay


def _decays_backward(num: Numbers, decay: Array, gradient: Array) -> tuple[Array]:
    change = decay * gradient  # of the log from s to t; gate r has the sum over s < r <= t
    to_here = jnp.asarray(np.tril(np.ones(decay.shape[-2:])), num.wide)
    return (num.exact("...t,tr->...r", change.sum(-1) - change.sum(-2), to_here),)


decays_of.defvjp(_decays_forward, _decays_backward)


BASE = 16  # rows of the blocks whose inverses start the others


@jax.custom_vjp
def inverse_of_unit_lower(x: Array) -> Array:
    """``(I + tril(x, -1))⁻¹`` of ``[..., C, C]``, C a power of two, level by level of the tree: as stable as substitution.

    With the inverses of both halves of a node, ``-lower⁻¹ · between · upper⁻¹`` is the part between them. Products alone: XLA's
    triangular solve never returned on several simulated devices (jaxlib 0.10.2).
    """
    size = x.shape[-1]
    half = min(size, BASE)
    inverse = jnp.broadcast_to(jnp.eye(half, dtype=x.dtype), (*x.shape[:-2], size // half, half, half))
    blocks = jnp.stack([x[..., i : i + half, i : i + half] for i in range(0, size, half)], -3)
    for pairs in levels_of(half).pairs[1:]:
        inverse = inverse - _exact("...ij,...jk,...kl->...il", inverse, pairs.astype(x.dtype) * blocks, inverse)
    while half < size:
        upper, lower = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        starts = range(0, size, 2 * half)
        between = jnp.stack([x[..., i + half : i + 2 * half, i : i + half] for i in starts], -3)
        corner = -_exact("...ij,...jk,...kl->...il", lower, between, upper)
        above = jnp.concatenate([upper, jnp.zeros_like(upper)], -1)
        inverse, half = jnp.concatenate([above, jnp.concatenate([corner, lower], -1)], -2), 2 * half
    return inverse[..., 0, :, :]


def _exact(axes: str, *factors: Array) -> Array:
    return einsum(axes, factors[0].dtype, factors[0].dtype, *factors)


def _inverse_forward(x: Array) -> tuple[Array, Array]:
    inverse = inverse_of_unit_lower(x)
    return inverse, inverse


def _inverse_backward(inverse: Array, gradient: Array) -> tuple[Array]:
    return (-jnp.tril(_exact("...ji,...jk,...lk->...il", inverse, gradient, inverse), -1),)


inverse_of_unit_lower.defvjp(_inverse_forward, _inverse_backward)


def chunk_spans(x: Tokens, num: Numbers) -> Spans:
    """The chunks of a block, each a span with the output of its own tokens."""
    q, k, v, size = x.q, x.k, x.v, x.v.shape[-2]
    per_channel = x.gate.ndim == 6
    logs = jnp.maximum(x.gate.astype(num.wide), LEAST_LOG)
    gate = Gate(logs[:, :, 0] if per_channel else logs, per_channel, num)
    through, after = gate.from_start(), gate.to_end()
    from_start, to_end = jnp.exp(through), jnp.exp(after)
    if per_channel:
        scores, log = gate.scores, through[..., -1, :][:, :, None]
    else:
        decay, log = gate.decays(), through[..., -1]
        scores = lambda q, k: num.product("pgntk,pgnsk->pgnts", q, k)[:, :, None] * decay  # noqa: E731
    scales = None if x.scales is None else x.scales.astype(num.wide)

    def output(pairs: Array) -> Array:
        return num.product("pgrnts,pgrnsv->pgrntv", pairs if scales is None else weigh(pairs, scales, size), v)

    if num.kernels and scales is not None:  # of the scalar gate, as the ops check
        from loglinear.jax.pallas import chunk_outputs

        out, state = chunk_outputs(q, k, v, logs, in_chunk(scales, size.bit_length()), num)
        return Spans(q, through, log, state, out)
    if x.beta is None and not per_channel:
        state = num.product("pgntk,pgrntv->pgrnkv", k, v * to_end[..., None], num.low)
        return Spans(q, through, log, state, output(scores(q, k)))
    if x.beta is None:
        state = num.product("pgntk,pgrntv->pgrnkv", k * to_end, v, num.low)
        return Spans((q * from_start).astype(num.low), None, log, state, output(scores(q, k)[:, :, None]))
    beta = x.beta[:, :, 0].astype(num.wide)
    if per_channel:
        pairs, overlap = scores(q, k), scores(k, k)
    else:
        pairs, overlap = scores(q, k)[:, :, 0], scores(k, k)[:, :, 0]
        from_start, to_end = from_start[:, :, 0, ..., None], to_end[:, :, 0, ..., None]
    solve = inverse_of_unit_lower(beta[..., None] * jnp.tril(overlap, -1)) * beta[..., None, :]
    pairs = num.product("pgnts,pgnsu->pgntu", pairs, solve)
    written = num.product("pgntk,pgntu->pgnku", k * to_end, solve)  # the write of each token, seen from the end
    seen = k * from_start
    whole = from_start[..., -1, :, None] * jnp.eye(k.shape[-1], dtype=num.wide)
    matrix = whole - num.product("pgnkt,pgntj->pgnkj", written, seen)
    rows = q * from_start - num.product("pgnts,pgnsk->pgntk", pairs, seen)
    state = num.product("pgnkt,pgrntv->pgrnkv", written, v, num.low)
    return Spans(rows.astype(num.low), None, matrix.astype(num.low)[:, :, None], state, output(pairs[:, :, None]))


# -------------------------------------------------------------------------------------------- many chunks


def act(map: Array, state: Array, num: Numbers) -> Array:
    """A state ``[p, g, r, …, K, V]`` after a span with this map."""
    if map.ndim == state.ndim:
        return num.product("pgrnij,pgrnjv->pgrniv", jnp.broadcast_to(map, (*state.shape[:4], *map.shape[4:])), state)
    log = map[..., None] if map.ndim == state.ndim - 1 else map[..., None, None]
    return jnp.exp(log) * state


def compose(later: Array, earlier: Array, matrix: bool, num: Numbers) -> Array:
    """The map of two spans in a row."""
    return num.product("...ij,...jk->...ik", later, earlier, num.low) if matrix else later + earlier


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def read(rows: Array, factor: Array, state: Array, num: Numbers) -> Array:
    """``factor · rows · state``, ``[p, g, r, n, t, V]``, of a factor of each row and states ``[p, g, r, n, K, V]``.

    The derivative makes the product once more, where JAX's own would keep it.
    """
    return factor[..., None] * num.product("pgntk,pgrnkv->pgrntv", rows, state, num.low)


def _read_forward(rows: Array, factor: Array, state: Array, num: Numbers) -> tuple[Array, tuple[Array, Array, Array]]:
    return read(rows, factor, state, num), (rows, factor, state)


def _read_backward(num: Numbers, kept: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    rows, factor, state = kept
    d_factor = (gradient * num.product("pgntk,pgrnkv->pgrntv", rows, state)).sum(-1)
    gradient = factor[..., None] * gradient
    d_rows = num.product("pgrntv,pgrnkv->pgntk", gradient, state).astype(rows.dtype)
    d_state = num.product("pgntk,pgrntv->pgrnkv", rows, gradient, num.as_wide_as(state)).astype(state.dtype)
    return d_rows, d_factor, d_state


read.defvjp(_read_forward, _read_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def halves(x: Array, axis: int) -> tuple[Array, Array]:
    """The left and the right span of each pair of neighbours along ``axis``. The derivative writes both at once."""
    left, right = (lax.slice_in_dim(x, at, None, 2, axis) for at in (0, 1))
    return left, right


def _halves_backward(axis: int, _: None, gradients: tuple[Array, Array]) -> tuple[Array]:
    left, right = gradients
    return (_side_by_side(left, right, axis),)


halves.defvjp(lambda x, axis: (halves(x, axis), None), _halves_backward)


def _side_by_side(left: Array, right: Array, axis: int) -> Array:
    """Spans of two arrays by turns."""
    both = jnp.stack([left, right], axis + 1)
    return both.reshape(*left.shape[:axis], 2 * left.shape[axis], *left.shape[axis + 1 :])


@jax.custom_vjp
def onto_right(out: Array, more: Array) -> Array:
    """Outputs ``[p, g, r, n, t, V]`` of spans, joined in pairs, with ``more`` added to the right halves."""
    left, right = (out[:, :, :, at::2] for at in (0, 1))
    return jnp.concatenate([left, right + more], 4)


def _onto_right_backward(_: None, gradient: Array) -> tuple[Array, Array]:
    p, g, r, n, length, width = gradient.shape
    apart = gradient.reshape(p, g, r, 2 * n, length // 2, width)
    return apart, apart[:, :, :, 1::2]


onto_right.defvjp(lambda out, more: (onto_right(out, more), None), _onto_right_backward)


def merge(spans: Spans, scale: Array | None, num: Numbers) -> Spans:
    """Neighbours become one span. ``scale [p, g, r, n, t]``: λ of the level between them."""
    matrix = spans.map.ndim == spans.state.ndim
    (map_l, map_r), (state_l, state_r) = halves(spans.map, 3), halves(spans.state, 3)
    rows_l, rows_r = halves(spans.rows, 2)
    factor = jnp.ones((), num.wide) if scale is None else scale[:, :, :, 1::2]
    if spans.weight is not None:  # the rows stay as they are
        weight_l, weight_r = halves(spans.weight, 3)
        factor = factor * jnp.exp(weight_r)
        weight = jnp.concatenate([weight_l, weight_r + map_l[..., None]], 4)
        rows = spans.rows.reshape(*rows_r.shape[:3], 2 * rows_r.shape[3], rows_r.shape[4])
    else:
        weight, decay = None, jnp.exp(map_l[:, :, 0, :, None]) if not matrix else None
        if decay is None:
            seen = num.product("pgntk,pgnkj->pgntj", rows_r, map_l[:, :, 0], num.low)
        else:
            seen = (rows_r * decay).astype(num.low)
        rows = jnp.concatenate([rows_l, seen], 3)
    factor = jnp.broadcast_to(factor, (*state_l.shape[:4], rows_r.shape[3]))
    return Spans(
        rows,
        weight,
        compose(map_r, map_l, matrix, num),
        (act(map_r, state_l, num) + state_r).astype(num.low),
        onto_right(spans.out, read(rows_r, factor, state_l, num)),
    )


def block_span(x: Tokens, num: Numbers) -> Spans:
    """A whole block as one span (n is 1), with the outputs that its own tokens give."""
    spans = chunk_spans(x, num)
    level = x.v.shape[-2].bit_length()
    while (n := spans.rows.shape[2]) > 1:
        scale = None
        if x.scales is not None:
            scale = x.scales[..., min(level, x.scales.shape[-1] - 1)].astype(num.wide)
            scale = scale.reshape(*scale.shape[:3], n, spans.rows.shape[3])
        spans = merge(spans, scale, num)
        level += 1
    return spans
