"""The kernels compile for GPUs that are not there, within their shared memory and with few spills.

The test records its numbers as properties (``pytest --junitxml``). ``python tests/kernels/test_compilation.py`` prints them
as the table of docs/kernels.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from loglinear import DecodingState
from loglinear.kernels import channel as channel_gate
from loglinear.kernels import decay as scalar_gate
from loglinear.kernels import decoding
from loglinear.kernels import delta as delta_rule
from loglinear.kernels.decay.span import choice
from loglinear.kernels.decoding import host, inputs, linear_step, outputs, residual
from loglinear.kernels.pointwise import (
    channel_gates,
    convolution,
    cross_entropy,
    elementwise,
    gated_norm,
    gates,
    level_scales,
    steps,
    unit_length,
)
from loglinear.kernels.tree import launching

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from compilation import Resources, built, recording

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What the compiler makes for 8.0 and 8.9 is what it makes for 8.6, which has the least memory: one rule is enough there.
PAIRS = [
    (target, delta) for target in TARGETS for delta in (False, True) if target not in ("sm_80", "sm_89") or not delta
]
SHARED_MEMORY = {
    **{"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10},
    **{"sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10},
}
# Bytes of local memory a thread that no kernel may exceed on Hopper, where the kernels are tuned. local_grads has 144 with
# triton 3.9: it holds λ of the next head through the products, and is faster so (0.38 ms against 0.43, docs/lab-notes.md).
# map_grads has 192, spilled before its loops and loaded after them; key_grads 200 with tiles of 128 columns, and is faster so
# (0.498 ms against 0.562, where triton 3.6 spills 96).
SPILLED_BYTES = 200
# The same of the span kernels. Triton 3.6 spills 80, 40, 48 and 0 bytes.
SPANS_SPILLED = {
    **{"span_output_kernel": 200, "span_query_grads_kernel": 250, "span_key_grads_kernel": 100},
    "span_local_grads_kernel": 100,
}
# Compiled for every target; the others, built of the same parts, for Hopper alone, to keep the test short.
EVERYWHERE = ("chunk_states_kernel", "output_kernel", "local_grads_kernel", "segment_sums_kernel", "gate_grads_kernel")
DELTA_EVERYWHERE = ("chunk_maps_kernel", "octet_grads_kernel", "key_grads_kernel")
# Those that hold the most at once where shared memory is small, by a compilation of all of them for sm_86 (docs/kernels.md).
LARGEST = ("value_grads_kernel", "key_grads_kernel")
DELTA_LARGEST = ("output_kernel", "map_grads_kernel")
# The delta rule under a gate per channel: map_grads takes 0.63 ms, and 0.60 without channels; gate_grads takes 2.03 ms, and
# 2.14 with tiles of 16 channels, which spill nothing (H200, Triton 3.6).
CHANNEL_SPILLED = {"map_grads_kernel": 288, "gate_grads_kernel": 160}
CHANNEL_DELTA = ("scores_kernel", "chunk_maps_kernel", "map_grads_kernel", "key_grads_kernel", "gate_grads_kernel")


def meta(*size: int, kind: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(size, dtype=kind, device="meta")


def launches(
    delta: bool, T: int = 16384, H: int = 16, G: int = 1, K: int = 128, V: int = 64, channel: bool = False
) -> list:
    """The launches of a forward and a backward pass in bfloat16, each kernel once."""
    wide = torch.float32
    x = {"q": meta(2, T, G, K), "k": meta(2, T, G, K), "v": meta(2, T, H, V)}
    x |= {"g": meta(2, T, H, *[K] * channel, kind=wide)}
    x |= {"level_scales": meta(2, T, H, 12, kind=torch.bfloat16 if channel else wide)}
    module = delta_rule if delta else channel_gate if channel else scalar_gate
    if delta:
        x["beta"] = meta(2, T, H, kind=wide)
    launching.plans_of.cache_clear()
    with recording() as found:
        module.forward(**x)
        module.backward(x["v"], **x)
    return list({launch.kernel: launch for launch in found}.values())


def noted(found: list[Resources], record_property: Callable) -> Iterator[Resources]:
    """Each of them, once its numbers are recorded."""
    for made in found:
        record_property(made.name, f"{made.registers} registers, {made.spills} spilled, {made.shared} shared")
        yield made


def resources(target: str, delta: bool, names: tuple[str, ...] = (), **sizes) -> list[Resources]:
    """The kernels of these names, as the host launches them on a GPU of the target's memory."""
    with mock.patch("loglinear.kernels.decay.forward.shared_memory", return_value=SHARED_MEMORY[target]):
        found = launches(delta, **sizes)
    chosen = [launch for launch in found if not names or launch.kernel.fn.__name__ in names]
    return built(chosen, TARGETS[target])


@pytest.mark.slow
@pytest.mark.parametrize(("target", "delta"), PAIRS)
def test_kernels_compile(target, delta, record_property):
    names = () if target == "sm_90" else DELTA_EVERYWHERE if delta else EVERYWHERE
    if target == "gfx942":  # there the host asks for another precision of this kernel's inverse
        names = tuple(name for name in names if name != "chunk_maps_kernel")
    for found in noted(resources(target, delta, names, **({"G": 16, "V": 128} if delta else {})), record_property):
        # On AMD the ops leave the delta rule to plain torch (kernels/devices.py).
        if not (delta and target == "gfx942"):
            assert found.shared <= SHARED_MEMORY[target], f"{found} needs more shared memory than {target} has"
        if target == "sm_90":
            assert found.spills <= SPILLED_BYTES, f"{found} spills"
            assert not found.overtaken, f"{found}: a copy may overtake these products"


@pytest.mark.slow
@pytest.mark.parametrize("delta", [False, True])
def test_kernels_of_the_gate_per_channel_compile(delta, record_property):
    """On Hopper without much spilling, and within a small GPU. Of the delta rule's kernels, those that see a gate."""
    names = CHANNEL_DELTA if delta else ()
    for found in noted(resources("sm_90", delta, names, H=4, G=4, V=128, channel=True), record_property):
        most = CHANNEL_SPILLED.get(found.name, SPILLED_BYTES) if delta else SPILLED_BYTES
        assert found.spills <= most, f"{found} spills"
        assert found.shared <= SHARED_MEMORY["sm_86"], f"{found} needs more shared memory than sm_86 has"
        assert not found.overtaken, f"{found}: a copy may overtake these products"


@pytest.mark.slow
def test_span_kernels_compile(record_property):
    """One program has all registers and nearly all shared memory of a multiprocessor."""
    if triton.__version__ < "3.6":
        pytest.skip(f"Triton {triton.__version__} has no Gluon for Hopper")
    with mock.patch.object(choice, "why_not_here", return_value=None):
        found = [launch for launch in launches(False, T=1000, H=48) if launch.kernel.is_gluon()]
    assert {launch.kernel.fn.__name__ for launch in found} == set(SPANS_SPILLED)
    for made in noted(built(found, TARGETS["sm_90"]), record_property):
        assert made.warps * 32 * made.registers <= 65536, f"{made} has more registers than a multiprocessor"
        assert made.spills <= SPANS_SPILLED[made.name], f"{made} spills"
        assert made.shared <= SHARED_MEMORY["sm_90"], f"{made} needs more shared memory than there is"


# (target, delta rule, kernels, sizes): the largest where there is little memory, and those of wide heads.
# At V = 128 the scalar gate's pipelines are shallower on sm_86: as deep as on an H100 they would take 130 KB.
FITTING = [("sm_86", False, LARGEST, {"G": 1, "V": 64}), ("sm_86", False, LARGEST, {"G": 1, "V": 128})]
FITTING += [("sm_86", True, DELTA_LARGEST, {"G": 2, "V": 128})]
FITTING += [
    ("sm_90", delta, ("query_grads_kernel", "map_grads_kernel"), {"G": 2, "K": 256, "V": 384}) for delta in (0, 1)
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "delta", "names", "sizes"), FITTING)
def test_the_largest_kernels_fit_into_shared_memory(target, delta, names, sizes, record_property):
    for found in noted(resources(target, bool(delta), names, H=2, **sizes), record_property):
        assert found.shared <= SHARED_MEMORY[target], f"{found} needs more shared memory than {target} has"


def step_resources(
    target: str, delta: bool, entries: torch.dtype = torch.float32, channel: bool = False
) -> list[Resources]:
    """The step kernels of one rule for one bfloat16 token: 48 heads of 128 x 64, or 16 of 128 x 128 but for the scalar gate."""
    H, G, K, V = (16, 16, 128, 128) if delta or channel else (48, 1, 128, 64)
    shapes = {"q": (1, 1, G, K), "k": (1, 1, G, K), "v": (1, 1, H, V), "level_scales": (1, 1, H, 18)}
    shapes |= {"g": (1, 1, H, K) if channel else (1, 1, H)}
    shapes |= {"beta": (1, 1, H)} if delta else {}
    x = {n: meta(*s, kind=torch.bfloat16 if n in "qkv" else torch.float32) for n, s in shapes.items()}
    state = DecodingState.empty(1, H, G, K, V, 1 << 17, torch.bfloat16, entries, delta, "meta", per_channel=channel)
    hip = "6" if TARGETS[target].backend == "hip" else None  # the host looks where it runs, not what it compiles for
    early = mock.patch.object(host, "dependent", return_value=target == "sm_90")
    with recording() as found, mock.patch.object(torch.version, "hip", hip), early:
        decoding.step(**x, state=state)
        return built(found, TARGETS[target])


@pytest.mark.slow
@pytest.mark.parametrize(("target", "delta"), PAIRS)
def test_steps_compile(target, delta, record_property):
    """Two programs on a multiprocessor at least: a step is bound by loads, and one program alone does not fill it."""
    for entries in (torch.float32, torch.bfloat16) if target == "sm_90" else (torch.float32,):
        for found in noted(step_resources(target, delta, entries), record_property):
            share = 2 if target != "gfx942" else 1
            assert found.shared * share <= SHARED_MEMORY[target], f"{found} needs more than half the shared memory"
            if target == "sm_90":
                assert found.spills == 0, f"{found} spills"


@pytest.mark.slow
@pytest.mark.parametrize("delta", [False, True])
def test_steps_of_a_gate_per_channel_compile(delta, record_property):
    """As many programs on a multiprocessor as without channels."""
    for found in noted(step_resources("sm_90", delta, channel=True), record_property):
        assert found.shared * 2 <= SHARED_MEMORY["sm_86"], f"{found} needs more than half the shared memory of sm_86"
        assert found.spills == 0, f"{found} spills"


def loss_resources(target: str) -> list[Resources]:
    """The kernel of the output layer's loss for logits of 32,000 bfloat16 columns."""
    hidden, weight = (torch.empty(size, 512, dtype=torch.bfloat16, device="meta") for size in (256, 32000))
    targets = torch.empty(256, dtype=torch.int64, device="meta")
    with recording() as found:
        cross_entropy.loss_and_gradients(hidden, weight, targets, -100, True, False)
        return built(found, TARGETS[target])


def fused_resources(target: str) -> list[Resources]:
    """What stands beside the recurrence in a step of one bfloat16 token, at the widths of ``step_resources``."""
    decay, hidden, position = meta(1, 1, 16, kind=torch.float32), meta(1, 1, 1536), meta(1, kind=torch.int64)
    heads, projected = [meta(1, 1, 16, 128) for _ in range(3)], meta(1, 1, 6448)
    with recording() as found:
        inputs.step_inputs(
            projected, meta(1, 1, 48 * 18), meta(1, 3, 3328), meta(3328, 4), meta(3328), meta(48), meta(48),
            meta(48, 18), (3072, 6400, -1, 3072),
        )  # fmt: skip
        x, gate = meta(1, 1, 3328)[..., :3072], projected[..., :3072]
        outputs.step_outputs(meta(1, 1, 48, 64), x, meta(48), gate, meta(3072), position, 1e-6, True)
        for g in (decay, meta(1, 1, 16, 128, kind=torch.float32)):
            linear_step.linear_step(*heads, g, decay, meta(1, 16, 128, 128, kind=torch.float32))
        residual.add_norm(hidden, hidden, meta(1536), 1e-6)
        elementwise.silu_times(hidden, hidden)
        return built(found, TARGETS[target])


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("kernels", [fused_resources, loss_resources])
def test_fused_steps_and_the_loss_compile(target, kernels):
    for found in kernels(target):
        assert found.shared <= 1024, f"{found}: only maxima and sums go through shared memory"
        assert found.spills == 0, f"{found} spills"


def pointwise_resources(target: str) -> list[Resources]:
    """Kernels around the attention op, mostly backward, in bfloat16: heads of 64 that share a norm, or of 128 that do not."""
    T, wide, levels = 4096, torch.float32, 15
    with recording() as found:
        y, v, rate, D = meta(2, T, 1024), meta(2, T, 16, 64), meta(2, T, 16), meta(16, kind=wide)
        first = y, y, meta(1024, kind=wide), y, D, 1e-6, True
        gated_norm.forward(*first)
        gated_norm.backward(y, *first)
        o = meta(2, T, 6, 128)
        gated_norm.backward(o, o, o, meta(128, kind=wide), None, None, 1e-6, False)
        hidden, weight = meta(2, T, 1536, kind=wide), meta(1536, kind=wide)
        gated_norm.backward(hidden, hidden, None, weight, None, None, 1e-6, False)
        gates.backward(meta(2, T, 16, kind=wide), v, v, None, rate, D, D, v, None)
        steps.backward(meta(2, T, 16, kind=wide), rate, rate, rate, D, D, rate)
        x, taps, bias, key = meta(2, T, 1024 + 256), meta(1280, 4, kind=wide), meta(1280, kind=wide), meta(2, T, 1, 128)
        convolution.backward(x, x, taps, bias, None)
        convolution.backward_with_values(v, y, key, key, x, taps, bias, None, meta(2, T, 16, kind=wide), D, x)
        channels, bias = meta(2, T, 16 * 128), meta(16 * 128, kind=wide)
        for bound in (None, -5.0):
            channel_gates.backward(meta(2, T, 16, 128, kind=wide), rate, channels, bias, D, rate, 16, bound)
        scales = meta(2, T, 16 * levels), meta(16, levels, kind=wide)
        level_scales.backward(meta(2, T, 16, levels), *scales, 0.0)
        unit_length.backward(o, o, o, o)
        elementwise.silu_product_backward(y, y, y)
        elementwise.wide_sum(y, y)
    return built(found, TARGETS[target])


@pytest.mark.slow
def test_pointwise_kernels_compile(record_property):
    for found in noted(pointwise_resources("sm_90"), record_property):
        assert found.spills == 0, f"{found} spills"
        assert found.shared <= 50 << 10, f"{found}: sums of rows, and tiles of wide rows on their way"


if __name__ == "__main__":
    for name in TARGETS:
        launched = (*resources(name, False, H=48), *resources(name, True, G=16, V=128))
        steps = *step_resources(name, False), *step_resources(name, True)
        for found in (*launched, *steps, *fused_resources(name), *loss_resources(name), *pointwise_resources(name)):
            print(f"| {name} | {found.name} | {found.warps} | {found.registers} | {found.spills} | {found.shared} |")
