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

# Logs below this are a decay to zero, also in float64, whose exp ends at -745; -inf would turn 0 · log into NaN.
LEAST_LOG = -1e3


class Numbers(NamedTuple):
    """How a call computes. low, wide: dtypes of the factors of products, and of sums, logs and states. kernels: whether
    a stage runs in Pallas (``pallas.py``).
    """

    low: jnp.dtype
    wide: jnp.dtype
    kernels: bool = False

    def product(self, axes: str, *factors: Array) -> Array:
        """An einsum of factors rounded to ``low``, summed in ``wide``."""
        return _einsum(axes, self.low, self.wide, *factors)

    def exact(self, axes: str, *factors: Array) -> Array:
        """An einsum in ``wide`` throughout."""
        return _einsum(axes, self.wide, self.wide, *factors)


def _einsum(axes: str, low: jnp.dtype, wide: jnp.dtype, *factors: Array) -> Array:
    precision = lax.Precision.DEFAULT if low == jnp.bfloat16 else lax.Precision.HIGHEST  # no TF32, no bfloat16 passes
    return jnp.einsum(axes, *(x.astype(low) for x in factors), precision=precision, preferred_element_type=wide)


def numbers_of(dtype: jnp.dtype, kernels: bool = False) -> Numbers:
    """float16 is computed in float32: sums of many products leave its range."""
    wide = jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
    return Numbers(jnp.dtype(jnp.bfloat16) if dtype == jnp.bfloat16 else wide, wide, kernels)


class Tokens(NamedTuple):
    """The tokens of one block of each row, ``T = n · C``: q, k ``[p, T, g, K]``, v ``[p, T, g, r, V]``, gate
    ``[p, T, g, r]`` or ``[p, T, g, 1, K]``, beta ``[p, T, g, r]`` or None, scales λ ``[p, T, g, r, L]`` or None.
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
    return _einsum(axes, factors[0].dtype, factors[0].dtype, *factors)


def _inverse_forward(x: Array) -> tuple[Array, Array]:
    inverse = inverse_of_unit_lower(x)
    return inverse, inverse


def _inverse_backward(inverse: Array, gradient: Array) -> tuple[Array]:
    return (-jnp.tril(_exact("...ji,...jk,...lk->...il", inverse, gradient, inverse), -1),)


inverse_of_unit_lower.defvjp(_inverse_forward, _inverse_backward)


def chunk_spans(x: Tokens, size: int, num: Numbers) -> Spans:
    """The chunks of a block, each a span with the output of its own tokens."""

    def chunks(y: Array, heads: int) -> Array:
        """``[p, n · C, heads…, …] -> [p, heads…, n, C, …]``."""
        y = y.reshape(y.shape[0], -1, size, *y.shape[2:])
        return jnp.moveaxis(y, (1, 2), (1 + heads, 2 + heads))

    q, k, v = chunks(x.q, 1), chunks(x.k, 1), chunks(x.v, 2)
    per_channel = x.gate.ndim == 5
    logs = jnp.maximum(chunks(x.gate, 2).astype(num.wide), LEAST_LOG)
    gate = Gate(logs[:, :, 0] if per_channel else logs, per_channel, num)
    through, after = gate.from_start(), gate.to_end()
    from_start, to_end = jnp.exp(through), jnp.exp(after)
    if per_channel:
        scores, log = gate.scores, through[..., -1, :][:, :, None]
    else:
        decay, log = gate.decays(), through[..., -1]
        scores = lambda q, k: num.product("pgntk,pgnsk->pgnts", q, k)[:, :, None] * decay  # noqa: E731
    scales = None if x.scales is None else chunks(x.scales, 2).astype(num.wide)

    def output(pairs: Array) -> Array:
        return num.product("pgrnts,pgrnsv->pgrntv", pairs if scales is None else weigh(pairs, scales, size), v)

    if num.kernels and scales is not None:  # of the scalar gate, as the ops check
        from loglinear.jax.pallas import chunk_outputs

        out, state = chunk_outputs(q, k, v, logs, in_chunk(scales, size.bit_length()), num)
        return Spans(q, through, log, state, out)
    if x.beta is None and not per_channel:
        state = num.product("pgntk,pgrntv->pgrnkv", k, v * to_end[..., None])
        return Spans(q, through, log, state, output(scores(q, k)))
    if x.beta is None:
        state = num.product("pgntk,pgrntv->pgrnkv", k * to_end, v)
        return Spans(q.astype(num.wide) * from_start, None, log, state, output(scores(q, k)[:, :, None]))
    beta = chunks(x.beta, 2).astype(num.wide)[:, :, 0]
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
    state = num.product("pgnkt,pgrntv->pgrnkv", written, v)
    return Spans(rows, None, matrix[:, :, None], state, output(pairs[:, :, None]))


# -------------------------------------------------------------------------------------------- many chunks


def act(map: Array, state: Array, num: Numbers) -> Array:
    """A state ``[p, g, r, …, K, V]`` after a span with this map."""
    if map.ndim == state.ndim:
        return num.product("pgrnij,pgrnjv->pgrniv", jnp.broadcast_to(map, (*state.shape[:3], *map.shape[3:])), state)
    log = map[..., None] if map.ndim == state.ndim - 1 else map[..., None, None]
    return jnp.exp(log) * state


def compose(later: Array, earlier: Array, matrix: bool, num: Numbers) -> Array:
    """The map of two spans in a row."""
    return num.product("...ij,...jk->...ik", later, earlier) if matrix else later + earlier


def read(rows: Array, weight: Array | None, scale: Array | None, state: Array, num: Numbers) -> Array:
    """``scale · exp(weight) · rows · state``, ``[p, g, r, n, t, V]``, of states ``[p, g, r, n, K, V]``."""
    out = num.product("pgntk,pgrnkv->pgrntv", rows, state)
    factor = scale if weight is None else jnp.exp(weight) if scale is None else scale * jnp.exp(weight)
    return out if factor is None else factor[..., None] * out


def merge(spans: Spans, scale: Array | None, num: Numbers) -> Spans:
    """Neighbours become one span. ``scale [p, g, r, n / 2, 2, t]``: λ of the level between them."""
    pairs = lambda x, axis=3: x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])  # noqa: E731
    rows, map, state, out = pairs(spans.rows, 2), pairs(spans.map), pairs(spans.state), pairs(spans.out)
    weight = None if spans.weight is None else pairs(spans.weight)
    matrix = map.ndim == state.ndim
    (map_l, map_r), (state_l, state_r) = (jnp.moveaxis(x, 4, 0) for x in (map, state))
    rows_l, rows_r = rows[:, :, :, 0], rows[:, :, :, 1]
    weight_l, weight_r = (None, None) if weight is None else (weight[..., 0, :], weight[..., 1, :])
    scale_r = None if scale is None else scale[..., 1, :]
    out_r = out[:, :, :, :, 1] + read(rows_r, weight_r, scale_r, state_l, num)
    if weight_r is not None:
        weight_r = weight_r + map_l[..., None]
    elif matrix:
        rows_r = num.product("pgntk,pgnkj->pgntj", rows_r, map_l[:, :, 0])
    else:
        rows_r = rows_r * jnp.exp(map_l[:, :, 0, :, None])
    return Spans(
        jnp.concatenate([rows_l, rows_r], 3),
        None if weight_l is None or weight_r is None else jnp.concatenate([weight_l, weight_r], 4),
        compose(map_r, map_l, matrix, num),
        act(map_r, state_l, num) + state_r,
        jnp.concatenate([out[:, :, :, :, 0], out_r], 4),
    )


def block_span(x: Tokens, size: int, num: Numbers) -> Spans:
    """A whole block as one span (n is 1), with the outputs that its own tokens give."""
    spans = chunk_spans(x, size, num)
    level = size.bit_length()
    while spans.rows.shape[2] > 1:
        length = spans.rows.shape[3]
        scale = None
        if x.scales is not None:
            scale = jnp.moveaxis(x.scales[..., min(level, x.scales.shape[-1] - 1)], 1, 3).astype(num.wide)
            scale = scale.reshape(*scale.shape[:3], -1, 2, length)
        spans = merge(spans, scale, num)
        level += 1
    return spans
