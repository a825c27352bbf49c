"""No kernel reads or writes outside the elements of its tensors, at shapes where the last tile, chunk or group is partial.

The test runs in Triton's interpreter alone (memcheck.py). The other files check the numbers.
"""

from __future__ import annotations

import importlib
import sys

import cases
import pytest
import torch
import triton
import triton.language as tl
from cases import INTERPRETED

from loglinear.kernels import decay as scalar_gate
from loglinear.kernels import delta as delta_rule
from loglinear.kernels.tree import launching
from loglinear.kernels.tuning import Launch, ScalarGateConfig, uniform, uniform_delta_config
from oracle import fused

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="reads the pointers of Triton's interpreter")
if INTERPRETED:
    from memcheck import Region, memcheck, sampled

PROGRAMS = 5  # of each launch: the first, the last, and some between; all of them would take five minutes


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    """Zeros: kernels read what a program that was left out has not written, and NaN would be a warning."""
    monkeypatch.setattr(launching, "scratch", lambda shape, dtype, device: torch.zeros(shape, dtype=dtype))


def config_for(delta: bool, tile: int):
    """Chunks of 16 tokens, and tiles of ``tile`` columns."""
    launch = Launch(warps=4, stages=1, block_v=tile)
    if delta:
        return uniform_delta_config(16, launch, segment=1)
    return uniform(ScalarGateConfig, launch, chunk=16, heads=2, segment=1, least_tile=16, block_k=tile)


def check(delta: bool, layout=lambda x: x, cuts=None, tile: int | None = 32, programs: int = PROGRAMS, **sizes):
    """A forward and a backward pass, with the tuned configuration if there is no ``tile``; returns the report."""
    x = layout(cases.make("cpu", cases.DELTA if delta else cases.DECAY, **sizes))
    do = torch.ones(1).expand(x["v"].shape)
    kernels = delta_rule if delta else scalar_gate
    bounds = None if cuts is None else torch.tensor(cuts, dtype=torch.int32)
    config = None if tile is None else config_for(delta, tile)
    with memcheck(programs) as report:
        kernels.forward(**x, cu_seqlens=bounds, config=config)
        kernels.backward(do.to(x["v"]), **x, cu_seqlens=bounds, config=config)
    assert not report.violations, f"{sizes}, tiles of {tile}:\n{report}"
    return report


def kernels_of(package) -> set[str]:
    """The kernels that its modules define or use, but for the sums of the gates, which span kernels alone read."""
    modules = [module for name, module in sys.modules.items() if name.startswith(package.__name__)]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")} - {"chunk_sums_kernel"}


rules = pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
FLOAT32, FLOAT16 = torch.float32, torch.float16
SIZES = {
    # Several tiles of either width, the last of them partial; heads that share a group; a partial last chunk.
    "widths that are no powers of two": dict(B=2, T=37, H=2, G=1, K=40, V=24, L=4, tile=16),
    # A chunk and a little more, with the tiles and chunks of a GPU, all of which must be powers of two.
    "tuned tiles of odd widths": dict(tile=None, programs=2, T=67, H=1, G=1, K=40, V=24),
    # Empty ones, one of one token, whole chunks, a whole group and a little more; tables have more rows than chunks.
    "packed": dict(cuts=(0, 0, 18, 19, 19, 35, 180, 180), T=180, H=2, G=2, K=24, V=16),
    # The first sequence has one tier of the tree, the last one three.
    "packed, several tiers": dict(cuts=(0, 5, 5, 1128), tile=16, T=1128, H=1, G=1, K=16, V=16),
}
EVERY = [(delta, dtype) for delta in (False, True) for dtype in (FLOAT32, FLOAT16)]
CASES = [(name, *kind) for name in list(SIZES)[:2] for kind in EVERY] + [("packed", *kind) for kind in EVERY[1::2]]
CASES += [("packed, several tiers", False, FLOAT16), ("packed, several tiers", True, FLOAT32)]


@pytest.mark.parametrize(("case", "delta", "dtype"), CASES)
def test_sizes(case, delta, dtype):
    check(delta, **SIZES[case], dtype=dtype)


@pytest.mark.parametrize(("delta", "dtype"), [(False, FLOAT32), (True, FLOAT16)], ids=["scalar", "delta"])
def test_several_tiers(delta, dtype):
    """More than 64 chunks, the last one of a single token; fewer levels than the tree has. Every kernel is launched."""
    report = check(delta, programs=10, T=16 * 72 + 1, H=1, G=1, K=16, V=16, L=9, dtype=dtype)
    assert report.programs.keys() == kernels_of(delta_rule if delta else scalar_gate)
    assert all(report.elements[name] for name in report.programs)


@rules
@pytest.mark.parametrize(("layout", "T"), [("sequence first", 1), ("fused", 17)])
def test_strides(delta, layout, T):
    def laid_out(x):
        return fused(x) if layout == "fused" else {name: cases.sequence_first(y) for name, y in x.items()}

    check(delta, laid_out, B=2, T=T, H=2, G=1, K=16, V=24, dtype=torch.float16)


def test_slices_of_heads(monkeypatch):
    """The delta rule's backward works on some heads of larger tensors, in place."""
    module = importlib.import_module("loglinear.kernels.delta.backward")
    monkeypatch.setattr(module, "heads_at_a_time", lambda *sizes: 1)
    check(True, programs=3, B=2, T=18, H=4, G=2, K=16, V=24, dtype=torch.float16)


@triton.jit
def copy_kernel(source, result, count, ahead, SIZE: tl.constexpr):
    """One program copies ``SIZE`` elements, ``ahead`` too far on."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE) + ahead
    tl.store(result + at, tl.load(source + at, mask=at < count + ahead, other=0), mask=at < count)


def test_one_element_too_far_is_found():
    """Of a part of a buffer, whose neighbours belong to the same storage."""
    source, result = torch.arange(32.0)[4:24], torch.zeros(20)
    with memcheck() as report:
        copy_kernel[(3,)](source, result, 20, 0, SIZE=8)
    assert not report.violations
    assert torch.equal(result, source)
    with memcheck() as report:
        copy_kernel[(3,)](source, result, 20, 1, SIZE=8)
    assert [str(found) for found in report.violations] == ["copy_kernel, program 2: a load of 1 elements out of bounds"]
    with memcheck(programs=2) as report:
        copy_kernel[(3,)](source, result[:10], 20, 0, SIZE=8)
    assert [(found.kind, found.program, found.count) for found in report.violations] == [("store", 2, 4)]
    assert report.programs == {"copy_kernel": 2}


def test_elements_of_a_slice():
    """Those of the heads beside it are not its own, nor is a part of an element."""
    x = torch.zeros(3, 4, 5, dtype=torch.float16)[:, 1:3]
    region = Region(x)
    addresses = region.first + torch.tensor([0, 2, 18, 20, 40, 98, 100, -2, 1]).numpy()
    assert region.holds(addresses, 2).tolist() == [True, True, True, False, True, True, False, False, False]
    assert not region.holds(addresses, 4).any()


def test_samples():
    assert sampled(5, 8) == [0, 1, 2, 3, 4]
    chosen = sampled(1000, 8)
    assert len(set(chosen)) == 8
    assert {0, 1, 998, 999} <= set(chosen)
    assert chosen == sampled(1000, 8)
