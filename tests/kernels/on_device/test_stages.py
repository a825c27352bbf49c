"""Every kernel against its twin in ``loglinear.reference.stages``: the first stage that fails here is the one that is wrong.

The launches of a forward and a backward pass are recorded with all their tensors, as each left them. What a kernel does not
write is full of NaN, so that ``only`` names the rows that it must write.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import cases
import pytest
import torch
from cases import CHANNEL, CHANNEL_DELTA, DECAY, DELTA, FLOAT32, INTERPRETED, config_of, cotangent, relative, wide
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loglinear.kernels import channel, decay, delta
from loglinear.kernels.tree import launching
from loglinear.reference.stages import channel as channel_stages
from loglinear.reference.stages import decay as decay_stages
from loglinear.reference.stages import delta_grads as delta_stages
from loglinear.reference.stages.delta import PREFIXES

SCALE = 0.6180339  # of no other test: a call like this has not been recorded for replay
# Entries of two groups whose windows take two segments, paths of two entries before a group; on a GPU a third tier too.
CHUNKS = ((1, 0, 17), (1, 0, 25)) if INTERPRETED else ((5, 0, 150), (5, 0, 90))


class Rounding(TorchDispatchMode):
    """Plain PyTorch at a narrow dtype: every operand of a matrix product is rounded to it."""

    PRODUCTS = (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.PRODUCTS:
            args = tuple(x.to(self.dtype).to(x.dtype) for x in args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch):
    """By kernel its launches, each as the tensors and numbers after it, by name; those in a bundle as ``bundle.name``."""
    found, launch = {}, launching.launch

    def spy(kernel, programs, *arguments, **constants):
        launch(kernel, programs, *arguments, **constants)
        values = {}
        for name, x in zip(kernel.arg_names, arguments):
            members = zip(x._fields, x) if isinstance(x, tuple) else [(None, x)]
            values |= {f"{name}.{part}" if part else name: y for part, y in members}
        values = {name: y.clone() if isinstance(y, Tensor) else y for name, y in values.items()}
        found.setdefault(kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__, []).append(values)

    monkeypatch.setattr(launching, "launch", spy)
    return found


def make(rule, device, chunks, dtype=torch.float32):
    """(inputs, cotangent, lengths, config) of packed sequences of so many chunks, the last chunk of each cut short."""
    V = 16 if INTERPRETED else 24
    config = config_of(rule, dtype, 16, V)
    if rule is not CHANNEL:
        config = dataclasses.replace(config, segment=min(config.segment, 1 if INTERPRETED else 8))
    lengths = tuple(max(n * config.chunk - 3, 0) for n in chunks)
    sizes = {"H": 2} if rule is DECAY or not INTERPRETED else {}
    # A span's matrix shrinks even without a gate. With the usual one those of whole octets are below the least float32.
    gate = "usual" if rule in (DECAY, CHANNEL) else "weak"
    x = cases.make(device, rule, T=sum(lengths), K=16, V=V, L=9, dtype=dtype, gate=gate, **sizes)
    return x, cotangent(x), lengths, config


def both(stages, kernels, launched, x, do, lengths, config):
    """Runs the kernels; the traces of the twin in float64 and, for 16 bits, of plain PyTorch."""
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], device=do.device)
    common = dict(scale=SCALE, cu_seqlens=bounds, config=config)
    (o,) = kernels.forward(**x, **common)
    results = kernels.backward(do, **x, **common)
    options = dict(scale=SCALE, lengths=lengths, chunk_size=config.chunk)
    exact = stages.trace(*wide(x).values(), do.double(), **options)
    if do.dtype == torch.float32:
        return o, results, exact, None
    with Rounding(do.dtype):
        return o, results, exact, stages.trace(*(y.float() for y in (*x.values(), do)), **options)[2]


class Compare:
    """Asks for the error of one stage after the other."""

    def __init__(self, made: dict, plain: dict | None) -> None:
        self.made, self.plain = made, plain

    def __call__(self, name: str, got: Tensor, view=lambda y: y, only=slice(None)) -> None:
        """``got`` against ``view`` of the twin, in rows ``only`` of both."""
        want = view(self.made[name])[only]
        got = got[only]
        assert got.shape == want.shape, name
        assert got.isfinite().all(), name
        bar = FLOAT32
        if self.plain is not None:  # half a unit of the narrow dtype is what storing the exact result costs
            bar = cases.LOW_PRECISION_FACTOR * max(
                relative(view(self.plain[name])[only], want), torch.finfo(got.dtype).eps / 2
            )
        error = relative(got, want)
        assert error <= bar, f"{name} has relative error {error:.2e} > {bar:.2e}"


def of_tokens(place, x: Tensor) -> Tensor:
    """``[H, B·T]`` -> ``[rows, H, C]``, as twins have it."""
    return place.chunked(x.mT.unsqueeze(0))


def tokens_alone(place, x: Tensor) -> Tensor:
    """x ``[rows, H, C]``, zero where there is no token."""
    return place.chunked(place.tokens(x, place.token[None]))


def check_sums(place, compare, sums: Tensor, chunk_log: Tensor) -> None:
    """Logs in base 2, the sums as planes of values and rounding errors."""
    assert relative(of_tokens(place, sums.sum(1)) * math.log(2), tokens_alone(place, compare.made["sums"])) <= FLOAT32
    assert relative(chunk_log[: place.all_chunks] * math.log(2), compare.made["chunk_log"]) <= FLOAT32


def spans(place) -> Tensor:
    """Chunks of the entry at each row."""
    return (place.n + 1) & -(place.n + 1)


def check_results(compare, x, results) -> None:
    for name, got in zip(x, results, strict=True):
        compare(f"d{name}", got)


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16])
def test_decay(device, launched, dtype):
    x, do, lengths, config = make(DECAY, device, CHUNKS[0], dtype)
    o, results, (place, _, made), plain = both(decay_stages, decay, launched, x, do, lengths, config)
    compare, rows, C = Compare(made, plain), place.all_chunks, config.chunk
    last = {name: calls[-1] for name, calls in launched.items()}
    states = last["chunk_states_kernel"]
    check_sums(place, compare, states["states.sums"], states["states.chunk_log"])
    compare("short_entries", states["states.entries"][:rows], only=spans(place) <= 8)
    compare("entries", last["node_states_kernel"]["states.entries"][:rows])
    assert relative(last["node_states_kernel"]["states.entry_log"][:rows] * math.log(2), made["entry_log"]) <= FLOAT32
    compare("o", o)

    local = last["local_grads_kernel"]
    blocks = local["score_grads"].shape[1]
    compare("score_grads", local["score_grads"][:rows], lambda y: y.unflatten(1, (blocks, -1)).sum(2))
    inner = slice(0, C.bit_length())
    compare("local_scales", local["dscales"][..., inner], lambda y: place.tokens(y, do)[..., inner])
    compare("inner_rows", of_tokens(place, local["gains.rows"]))
    compare("inner_columns", of_tokens(place, local["gains.columns"]))
    query = last["query_grads_kernel"]
    compare("gains.rows", of_tokens(place, query["gains.rows"]))
    for m in place.levels:
        if len(place.reads[m][0]):
            got = query["gains.levels"][m].mT
            compare("gains.levels", got[:rows], lambda y, m=m: y[m], only=place.reads[m][0])
    followed = torch.tensor(
        [row for _, row in zip(*(y.tolist() for y in place.octet_end)) if place.n[row] + 1 < place.chunks[row]]
    )
    nodes = last.get("segment_sums_kernel", last["window_grads_kernel"])["out.nodes"]
    compare("node_grads", nodes[: len(place.tiers[0].unit)], only=place.octet[followed])
    chunk = last["chunk_grads_kernel"]
    compare("chunk_grads", chunk["chunk_grads"][:rows])
    carried = torch.cat([entry for entry, _ in place.parents[1:]])
    compare("gains.beyond", chunk["gains.beyond"].sum(2)[:rows], only=carried)
    value = last["value_grads_kernel"]
    compare("gains.columns", of_tokens(place, value["gains.columns"]))
    compare("gains.chunks", value["gains.chunks"][:rows])
    check_results(compare, x, results)


def check_maps(compare, place, launched, last, K) -> None:
    """The delta rule's maps, and its paths of whole groups."""
    maps = last["chunk_maps_kernel"]
    compare("solve", maps["solve"][: place.all_chunks])
    compare("writes", maps["writes"][: place.all_chunks])
    tiers = len(place.tiers)
    upward = launched["octet_maps_kernel"][len(launched["octet_maps_kernel"]) // 2 :]  # the forward makes as many
    for t in range(tiers):
        tier = place.tiers[t]
        there = tier.unit[:, PREFIXES] >= 0
        prefixes = upward[t]["prefixes"].unflatten(0, (-1, 4))[: len(tier.unit)]
        compare("before", prefixes, lambda y, t=t: y[t][:, PREFIXES], only=there)
        if t + 1 < tiers:
            compare("units", upward[t]["whole_maps"][: len(tier.unit)], lambda y, t=t: y[t + 1], only=tier.whole)
    compare("entries", upward[-1]["entries"][: place.all_chunks], only=spans(place) > 1)
    if len(place.outer) > 1:
        states, first = last["path_states_kernel"]["states"], place.outer[0][2]
        stored = torch.ones(place.path_slots, dtype=torch.bool, device=first.device).index_fill(0, first, False)
        compare("path_states", states[: place.path_slots, ..., K:], lambda y: y[..., K:], only=stored)
    if len(place.outer) > 2:
        further = torch.cat([slot for _, _, slot in place.outer[2:]])
        compare("path_states", states[: place.path_slots], only=further)


def check_tree_grads(compare, place, launched, last, K) -> None:
    """The delta rule's gradients from the queries of paths to the maps of chunks."""
    queries, path = last["path_queries_kernel"], last["path_grads_kernel"]
    slots = torch.cat([slot for _, _, slot in place.inner])
    compare("inner_queries", queries["inner_queries"][: place.inner_slots], only=slots)
    compare("octet_queries", queries["octet_queries"][: place.all_chunks], only=place.n >= 8)
    size = spans(place)
    earlier = torch.cat([slot[place.n[entry] + 1 > size[entry]] for _, entry, slot in place.inner])
    compare("inner_grads", path["inner_grads"][: place.inner_slots], only=earlier)
    compare("query_grads", path["query_grads"][: place.all_chunks])
    state_grads = last["path_state_grads_kernel"]["path_grads"][: place.path_slots, ..., K:]
    compare("path_grads", state_grads, lambda y: y[..., K:])
    if len(place.outer) > 1:
        carried = last["transport_grads_kernel"]["path_grads"][: place.path_slots]
        compare("path_grads", carried, only=torch.cat([slot for _, _, slot in place.outer[1:]]) - 1)
    compare("entry_grads", last["entry_grads_kernel"]["grads"][: place.all_chunks], only=size < 8)
    wide = last.get("segment_sums_kernel", last["wide_entry_grads_kernel"])["grads"][: place.all_chunks]
    compare("entry_grads", wide, only=size >= 8)
    for tier, t, call in zip(place.tiers, range(9), reversed(launched["octet_grads_kernel"])):
        compare("prefix_grads", prefix_rows(tier, call), lambda y, t=t: y[t], only=tier.unit >= 0)
    for t, call in zip(range(1, len(place.tiers)), reversed(launched.get("unit_grads_kernel", []))):
        whole = place.tiers[t].unit[place.tiers[t].unit >= 0]
        compare("unit_grads", call["map_grads"], lambda y, t=t: y[t - 1], only=whole)


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", [DELTA, CHANNEL_DELTA], ids=["scalar", "channel"])
def test_delta(device, launched, rule, dtype):
    chunks = (1, 0, 9) if INTERPRETED and rule is CHANNEL_DELTA else CHUNKS[1]
    x, do, lengths, config = make(rule, device, chunks, dtype)
    o, results, (place, _, made), plain = both(delta_stages, delta, launched, x, do, lengths, config)
    compare, rows, C, K = Compare(made, plain), place.all_chunks, config.chunk, x["k"].shape[3]
    last = {name: calls[-1] for name, calls in launched.items()}
    if rule is CHANNEL_DELTA:
        check_prepared(compare, place, last, do)
    else:
        check_sums(place, compare, last["chunk_maps_kernel"]["sums"], last["chunk_maps_kernel"]["chunk_log"])
    check_maps(compare, place, launched, last, K)
    compare("o", o)

    check_tree_grads(compare, place, launched, last, K)
    outer = slice(C.bit_length(), None)
    scales = last["path_grads_kernel"]["out.dscales"]
    compare("upper_scales", scales[..., outer], lambda y: place.tokens(y, do)[..., outer])
    scores, found = last["score_grads_kernel"], last["map_grads_kernel"]
    for i, name in enumerate(("products", "masked", "product_grads", "solve_grads")):
        compare(name, scores["scores"][:rows, :, i])
    compare("map.writes", found["key_grads"][:rows, :, 0])
    compare("map.keys", found["key_grads"][:rows, :, 1])
    compare("map.solve", found["scores"][:rows, :, 3])
    compare("map.chunks", found["chunk_gains"][:rows])
    if rule is CHANNEL_DELTA:
        keys = last["key_grads_kernel"]
        compare("overlap_grads", keys["scores"][:rows, :, 3])
        compare("dstarts", keys["key_grads"][:rows, :, 0])
        compare("around", keys["around"][:rows])
    else:
        compare("gains", of_tokens(place, scores["gains"]))
        compare("map.ends", of_tokens(place, found["end_gains"]))
    check_results(compare, x, results)


def check_prepared(compare, place, last, do) -> None:
    """The stages before the tree under a gate per channel."""
    rows, made, prepared = place.all_chunks, compare.made, last["scores_kernel"]
    sums = last["sums_kernel"]["sums"].sum(2) * math.log(2)
    assert relative(sums, place.tokens(made["prepared.sums"], sums.unsqueeze(0))[0]) <= FLOAT32
    assert relative(prepared["made.chunk_log"][:rows] * math.log(2), made["prepared.chunk_log"]) <= FLOAT32
    for name in ("q", "k", "starts"):
        if made[f"prepared.{name}"] is not None:
            compare(f"prepared.{name}", prepared[f"made.{name}"], lambda y: place.tokens(y, do)[0])
    for name in ("scores", "overlaps"):
        if made[f"prepared.{name}"] is not None:
            compare(f"prepared.{name}", prepared[f"made.{name}"][:rows])


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16])
def test_channel(device, launched, dtype):
    chunks = (1, 0, 5) if INTERPRETED else CHUNKS[0]
    x, do, lengths, config = make(CHANNEL, device, chunks, dtype)
    o, results, (place, _, made), plain = both(channel_stages, channel, launched, x, do, lengths, config)
    compare, rows, C = Compare(made, plain), place.all_chunks, config.chunk
    last = {name: calls[-1] for name, calls in launched.items()}
    check_prepared(compare, place, last, do)
    carried = place.n + 1 < place.chunks
    entries, entry_grads = (call["entries"][:rows] for call in launched["entries_kernel"][-2:])
    compare("entries", entries, only=carried)
    compare("o", o)

    compare("score_grads", last["local_grads_kernel"]["score_grads"][:rows])
    inner = slice(0, C.bit_length())
    local = last["local_grads_kernel"]["dscales"][..., inner]
    compare("local_scales", local, lambda y: place.tokens(y, do)[..., inner])
    query = last["query_grads_kernel"]
    compare("grads.q", query["grads.q"], lambda y: place.tokens(y, do)[0])
    windows = last["window_sums_kernel"]["grads.levels"]
    for m in place.levels:
        if len(place.reads[m][0]):
            read = place.reads[m][0]
            compare("levels", query["grads.levels"][m][:rows], lambda y, m=m: y[m], only=read)
            if m < len(windows) and made["windows"][m][read].norm() > 0:
                compare("windows", windows[m][:rows], lambda y, m=m: y[m], only=read)
    compare("entry_grads", entry_grads, only=carried)
    compare("chunk_grads", last["chunk_grads_kernel"]["grads.chunks"][:rows], only=carried)
    compare("beyond", last["chunk_grads_kernel"]["grads.beyond"].sum(0)[:rows], only=carried)
    keys = last["key_grads_kernel"]
    compare("grads.k", keys["grads.k"], lambda y: place.tokens(y, do)[0])
    compare("around", keys["grads.around"][:rows])
    check_results(compare, x, results)


def prefix_rows(tier, call) -> Tensor:
    """X ``[groups, 8, H, K, K+V]`` from where the kernel leaves it: the row of an entry, or one of the group's own rows."""
    c = torch.arange(8, device=tier.unit.device)
    own = call["spare"] + torch.arange(len(tier.unit), device=c.device)[:, None] * 4 + (c - 3).clamp(min=0)
    return call["grads"][torch.where(c & (c + 1) == 0, tier.chunk, own)]
