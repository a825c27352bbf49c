"""CHUNKWISE form: O(T log T) in matrix products, and the implementation of the public ops wherever no kernel runs.

The algorithm in five lines (stages: chunk states, node states, output):

1. Every chunk is a span: scores within it, its queries seen from its start, and the affine map (A, S) it applies.
2. Entry e of the Fenwick array starts as the map of chunk e - 1. Level by level it folds in entry e - 2**m.
3. Within a chunk the output is masked attention, ``(scores ∘ M) V``.
4. Across chunks a query walks ``e = n; e -= lowbit(e)``. At each entry it adds ``λ ∘ (Q S_e)`` and then jumps over the
   entry, ``Q <- Q A_e``.
5. The entries that a query of the next chunk would read are the state for decoding.

Loops run over levels only. A state given on the way in is a row of entries with the identity as transition, so training,
prefill, chunked prefill and decoding are one function at different T. Source: Guo et al. 2025, section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loglinear.reference.dense import level_matrix
from loglinear.reference.finite import spoil, spoiled_by, without_bad_tokens
from loglinear.reference.layout import Layout, build_layout
from loglinear.reference.transition import Span, Transition, transition_of
from loglinear.state import CHUNK_SIZE, LinearState, LogLinearState


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor | None,
    beta: Tensor | None = None,
    state: LogLinearState | LinearState | None = None,
    lengths: tuple[int, ...] | None = None,
    positions: tuple[int, ...] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, LogLinearState | LinearState]:
    """Log-linear attention over sequences, with the state that continues each of them.

    Args:
        q, k: ``[B, T, G, K]``. v: ``[B, T, H, V]``. g: ``[B, T, H]`` (or ``[B, T, H, K]``, diagonal). beta: ``[B, T, H]``.
            All of one floating-point dtype, in which everything is computed.
        level_scales: λ ``[B, T, H, L]``, or None for the linear model.
        state: what came before; ``state.position`` must equal ``positions``.
        lengths: new tokens of each sequence, in the order of the flattened ``B·T`` tokens; default: B rows of T.
        positions: tokens each sequence has already seen, on the host; default: read from the state.
        chunk_size: C, a power of two; a log-linear state's own when there is one.

    Returns:
        o ``[B, T, H, V]`` and the state after the last token, with one row per sequence.
    """
    lengths = lengths if lengths is not None else (q.shape[1],) * q.shape[0]
    linear = level_scales is None
    if positions is None:
        positions = (0,) * len(lengths) if state is None else tuple(state.position.tolist())
    tree = state if isinstance(state, LogLinearState) else None
    chunk_size = tree.chunk_size if tree is not None else chunk_size
    num_slots = tree.entries.shape[2] if tree is not None else 0
    # A linear model has no tree to align with: its chunks start where its new tokens do.
    layout = build_layout(
        lengths, (0,) * len(lengths) if linear else positions, num_slots, chunk_size, q.device, linear
    )

    def chunks(x: Tensor, opened: Tensor | None) -> Tensor:
        """``[B, T, ...]`` -> ``[N, C, ...]``; empty places hold zeros, which write nothing and decay nothing."""
        flat = x.reshape(-1, *x.shape[2:])
        if layout.regular:
            return flat.reshape(layout.num_chunks, chunk_size, *x.shape[2:])
        places = flat.new_zeros(layout.num_chunks * chunk_size, *x.shape[2:]).index_copy(0, layout.place, flat)
        if opened is not None:
            live = opened.transpose(1, 2).reshape(-1, *x.shape[2:]).index_select(0, layout.open_from)
            places = places.index_copy(0, layout.open_place, live.to(places.dtype))
        return places.reshape(layout.num_chunks, chunk_size, *x.shape[2:])

    opened = (tree.open_k, tree.open_v, tree.open_g, tree.open_beta) if tree is not None else (None,) * 4
    k, v, g = chunks(k, opened[0]), chunks(v, opened[1]), chunks(g, opened[2])
    beta = chunks(beta, opened[3]) if beta is not None else None
    given, beta_given = (k, v, g), beta
    k, v, g, beta, bad = without_bad_tokens(k, v, g, beta)
    spoiled, spoiled_slots = spoiled_by(bad, layout.run, layout.spans)
    heads_per_group = v.shape[2] // k.shape[2]
    query, key, value, gate = (x.transpose(1, 2) for x in (chunks(q, None), k, v, g))
    if heads_per_group > 1:
        query, key = (x.repeat_interleave(heads_per_group, 1) for x in (query, key))
    transition = transition_of(gate, beta.transpose(1, 2) if beta is not None else None, key)
    span = transition.span(query, key, value)
    final: LogLinearState | LinearState
    if level_scales is None:
        out, final = _linear(span, value, transition, layout, state, positions)
        final.state = spoil(final.state, spoiled_slots[:, 0])
    else:
        scales = chunks(level_scales, None).transpose(1, 2)
        out, entries, decay = _tree(span, value, scales, transition, layout, tree)
        open_k, open_v, open_g = (_open_tokens(x, layout) for x in given)
        rate = None if beta_given is None else _open_tokens(beta_given, layout)
        entries = spoil(entries, spoiled_slots.mT)
        final = LogLinearState(layout.position.clone(), entries, decay, open_k, open_v, open_g, rate, chunk_size)
    out = spoil(out.transpose(1, 2), spoiled).flatten(0, 1)
    out = out if layout.regular else out.index_select(0, layout.place)
    return out.reshape(*q.shape[:2], *out.shape[1:]), final


def _open_tokens(x: Tensor, layout: Layout) -> Tensor:
    """``[N, C, heads, ...]`` -> ``[S, heads, C, ...]``: the tokens of the open chunk, zeros where there are none yet."""
    dead = ~layout.open_live.reshape(*layout.open_live.shape, *(1,) * (x.dim() - 2))
    return x.index_select(0, layout.open_chunk).masked_fill(dead, 0.0).transpose(1, 2)  # 0 · (-inf) would be NaN


def _chunk_mask(scales: Tensor) -> Tensor:
    """``dense.level_mask`` for many small spans: λ times a one-hot of the levels, one matrix product per token."""
    n, heads, size, levels = scales.shape
    levels = min(levels, (size - 1).bit_length() + 1)
    index = level_matrix(size, device=scales.device).clamp_(max=levels - 1)
    past = torch.ones_like(index).tril_().bool()
    one_hot = F.one_hot(index, levels).masked_fill(~past.unsqueeze(-1), 0).mT.to(scales.dtype)  # [t, level, s]
    by_token = scales[..., :levels].permute(2, 0, 1, 3).reshape(size, n * heads, levels)
    return torch.bmm(by_token, one_hot).reshape(size, n, heads, size).permute(1, 2, 0, 3)


def _tree(
    span: Span, v: Tensor, scales: Tensor, transition: Transition, layout: Layout, state: LogLinearState | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Stages 2 to 5 of the listing above; spans and v ``[N, H, C, ...]``, scales ``[N, H, C, L]``."""
    chunk_level = (scales.shape[2] - 1).bit_length() + 1  # the first level that lies outside a chunk
    states, maps, decay = span.state, span.transition, torch.zeros_like(span.state[..., 0, 0])
    if state is not None:
        before = state.entries.transpose(1, 2).flatten(0, 1).to(states.dtype)
        states = torch.cat([states, before])
        maps = torch.cat([maps, transition.identity(before)])
        decay = torch.cat([decay, state.decay.mT.flatten(0, 1).to(decay.dtype)])

    for entry, earlier in layout.builds:
        a = maps.index_select(0, entry)
        carried = transition.act(a, states.index_select(0, earlier), decay.index_select(0, earlier))
        states.index_add_(0, entry, carried)
        maps.index_copy_(0, entry, transition.compose(a, maps.index_select(0, earlier)))

    out = (span.scores * _chunk_mask(scales)) @ v
    query, weight, by_level = span.query, span.weight, scales.unbind(-1)
    for m, (chunk, entry) in enumerate(layout.reads):
        q, w, a = query.index_select(0, chunk), weight.index_select(0, chunk), maps.index_select(0, entry)
        scale = by_level[min(chunk_level + m, len(by_level) - 1)].index_select(0, chunk)
        factor = scale * (w + decay.index_select(0, entry)[..., None]).exp()
        out.index_add_(0, chunk, factor.unsqueeze(-1) * (q @ states.index_select(0, entry)))
        jumped, weighed = transition.jump(q, w, a)
        if jumped is not q:
            query.index_copy_(0, chunk, jumped)
        if weighed is not w:
            weight.index_copy_(0, chunk, weighed)
    return out, *_final(states, maps, decay, transition, layout)


def _final(
    states: Tensor, maps: Tensor, decay: Tensor, transition: Transition, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Entries and log decays of the state: what is on the path of the open chunk, seen from the start of that chunk.

    ``[S, H, M, K, V]`` and ``[S, H, M]``. A scalar gate only adds to the log decay of an entry; the other transitions carry the
    entry itself.
    """
    count = layout.position.shape[0]
    head = states.shape[1:]
    entries = states.new_zeros(count, layout.num_slots, *head)
    logs = states.new_zeros(count, layout.num_slots, head[0])
    weight = states.new_zeros(count, head[0])
    carried = transition.identity(states.new_zeros(count, *head))
    lazy = weight.shape == carried.shape
    for m, (sequence, entry) in enumerate(layout.final_reads):
        slot = torch.full_like(sequence, m)
        after, state = carried.index_select(0, sequence), states.index_select(0, entry)
        log = decay.index_select(0, entry)
        entries = entries.index_put((sequence, slot), state if lazy else transition.act(after, state, log))
        logs = logs.index_put((sequence, slot), log + after) if lazy else logs
        carried = carried.index_copy(0, sequence, transition.compose(after, maps.index_select(0, entry)))
    return entries.transpose(1, 2), logs.mT


def _linear(
    span: Span,
    v: Tensor,
    transition: Transition,
    layout: Layout,
    state: LinearState | LogLinearState | None,
    positions: tuple[int, ...],
) -> tuple[Tensor, LinearState]:
    """λ = 1: one state per sequence, carried from chunk to chunk. The linear twin, and its O(1) state."""
    if state is not None and not isinstance(state, LinearState):
        raise TypeError(f"initial_state must be a LinearState when level_scales is None: got {type(state).__name__}")
    head = span.state.shape[1:]
    count = layout.position.shape[0]
    carry = span.state.new_zeros(count, *head) if state is None else state.state.to(span.state.dtype, copy=True)
    sizes = [len(chunk) for _, chunk in layout.waves]
    before = []
    if sizes:
        order = torch.cat([chunk for _, chunk in layout.waves])
        waves = zip(layout.waves, *(x.index_select(0, order).split(sizes) for x in (span.transition, span.state)))
        for (sequence, _), a, added in waves:
            before.append(carry.index_select(0, sequence))
            carried = transition.act(a, before[-1], torch.zeros_like(added[..., 0, 0]))
            carry = carry.index_copy(0, sequence, carried + added)
    out = span.scores @ v
    if before:
        entering = torch.cat(before).index_select(0, order.argsort())
        out = out[: layout.num_local] + span.weight.exp().unsqueeze(-1) * (span.query @ entering)
    seen = torch.tensor(positions, device=layout.position.device)
    return out, LinearState(layout.position + seen, carry)
