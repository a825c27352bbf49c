"""Replayed calls: what is repeated is what was recorded, with the addresses of the new tensors. No kernel runs here."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
from compilation import recording, source
from triton.backends.nvidia import driver as nvidia

from loglinear import DecodingState
from loglinear.kernels import decay as scalar_gate
from loglinear.kernels import delta as delta_rule
from loglinear.kernels.tree import launching, plan
from loglinear.kernels.tree.launching import launch, replay, scratch


class Compiled:
    """Stands for a compiled kernel: notes the grid, the stream and the arguments of every launch that a plan makes of it."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, name):
        self.name, self.calls = name, []

    def __getitem__(self, grid):
        return None

    def run(self, *arguments):
        assert arguments[4:9] == ("function", "metadata", None, None, None)
        self.calls.append((arguments[:3], arguments[3], *arguments[9:]))


class Kernel:
    """Stands for a kernel with the arguments of ``names``; counts its launches from the host code."""

    def __init__(self, *names):
        self.arg_names, self.compiled, self.launches = list(names), Compiled(names), 0

    def __getitem__(self, grid):
        def start(*arguments, **constants):
            self.launches += 1
            return self.compiled

        return start


@pytest.fixture
def host(monkeypatch):
    """A stream on the CPU, and no plans yet."""
    monkeypatch.setattr(launching, "current_stream", lambda device: 7)
    launching.plans_of.cache_clear()
    yield
    launching.plans_of.cache_clear()


def two_stages(first, second):
    def function(inputs, factor):
        x, y = inputs
        middle = scratch((x.numel(), 3), x.dtype, x.device)
        result = scratch(tuple(x.shape), x.dtype, x.device)
        launch(first, 5, x, middle, factor, SIZE=4)
        launch(second, 6, middle[1:], y, result, SIZE=8)
        return result, None

    return function


def test_the_second_call_repeats_the_launches_with_its_own_addresses(host):
    first, second = Kernel("x", "middle", "factor", "SIZE"), Kernel("middle", "y", "result", "SIZE")
    function = two_stages(first, second)
    x = torch.zeros(4)
    replay(function, [x, x], 0.5)  # one tensor for both inputs: the next call has two
    a, b = torch.zeros(4), torch.zeros(4)
    result, nothing = replay(function, [a, b], 0.5)
    assert nothing is None
    assert result.shape == a.shape
    assert (first.launches, second.launches) == (1, 1)
    (call,) = first.compiled.calls
    assert call[:3] == ((5, 1, 1), 7, a.data_ptr())
    middle = call[3]
    assert call[4:] == (0.5, 4)
    (call,) = second.compiled.calls
    assert call[2:] == (middle + 12, b.data_ptr(), result.data_ptr(), 8)


class Bundle(NamedTuple):
    """Stands for a bundle of pointers and their strides."""

    x: Any
    absent: Any
    middle: Any
    stride: Any


def test_arguments_keep_their_form_and_get_the_new_addresses(host):
    """Triton's launcher takes a bundle as a tuple, and a descriptor with what was said of its tensor; of compile-time
    arguments, which it leaves out, nothing is known."""
    kernel = Kernel("bundle", "described", "other", "result", "S")

    def function(inputs):
        (x,) = inputs
        middle, result = scratch((4,), x.dtype, x.device), scratch((4,), x.dtype, x.device)
        described = (
            SimpleNamespace(base=y, shape=[size], strides=[1], block_shape=[2], padding="nan")
            for y, size in ((x[1:], 3), (middle, 4))
        )
        launch(kernel, 5, Bundle(x[1:], None, middle, 16), *described, result, S=(1, 2))
        return (result.view(2, 2),)

    replay(function, [torch.zeros(4)])
    x = torch.zeros(4)
    (result,) = replay(function, [x])
    (call,) = kernel.compiled.calls
    assert result.shape == (2, 2)
    (address, absent, middle, stride), first, second, last, constant = call[2:]
    assert (address, absent, stride, last, constant) == (x.data_ptr() + 4, None, 16, result.data_ptr(), (1, 2))
    assert (first.base.data_ptr(), first.shape) == (address, (3,))
    assert (second.base.data_ptr(), second.shape, second.strides, second.padding) == (middle, (4,), (1,), "nan")
    assert abs(middle - result.data_ptr()) >= 16


def test_descriptors_are_encoded_once_for_an_address(host, monkeypatch):
    """Triton's own launcher, and what it launches by: an encoded descriptor with its sizes in the place of the descriptor."""
    kernel, encoded, launched = Kernel("described", "y", "size"), [], []

    def encode(address, swizzle, element, kind, block, shape, strides, padding):
        encoded.append((address, swizzle, tuple(block), shape, strides))
        return f"map {len(encoded)}"

    utils = SimpleNamespace(fill_tma_descriptor_tiled=encode, fill_tma_descriptor=encode)
    monkeypatch.setattr(type(triton.runtime.driver), "active", SimpleNamespace(utils=utils))
    meta = {"swizzle": 3, "elem_size": 2, "elem_type": 9, "block_size": [128, 64], "fp4_padded": False}
    launcher = nvidia.CudaLauncher.__new__(nvidia.CudaLauncher)
    vars(launcher).update(
        launch=nvidia.wrap_handle_tensordesc(
            lambda *x: launched.append(x), {0: "tensordesc<bf16>", 1: "*fp32", 2: "i32"}, [meta]
        ),
        **dict.fromkeys(("num_ctas", "global_scratch_align", "profile_scratch_align"), 1),
        **dict.fromkeys(("global_scratch_size", "profile_scratch_size", "launch_pdl", "launch_cooperative_grid"), 0),
        **dict.fromkeys(("arg_annotations", "kernel_signature")),
    )
    kernel.compiled.run = launcher

    def function(inputs):
        (x,) = inputs
        y = scratch((4,), x.dtype, x.device)
        settings = {"shape": [256, 64], "strides": [64, 1], "block_shape": [128, 64], "padding": "zero"}
        launch(kernel, 5, SimpleNamespace(base=x, **settings), y, 9)
        return (y,)

    y = torch.zeros(4)
    monkeypatch.setattr(launching, "memory", lambda *layout: y)  # PyTorch gives the same memory again
    first, second = torch.zeros(256, 64), torch.zeros(256, 64)
    for x in (first, first, second, first):
        replay(function, [x])
    expected = (3, (128, 64), (256, 64), (64, 1))
    assert encoded == [(x.data_ptr(), *expected) for x in (first, second)]
    rest = [256, 64, 64, 1, y.data_ptr(), 9]
    assert [list(x[-1]) for x in launched] == [[f"map {i}", *rest] for i in (1, 2, 1)]


@pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_repeated_calls_give_every_kernel_arguments_of_its_signature(host, delta, packed):
    """Of all launches of a forward and a backward pass, against what Triton would compile them for: addresses in the place of
    pointers, numbers and nothing where the first call had them, in the same bundles."""
    module, fakes = delta_rule if delta else scalar_gate, []
    sizes = {"q": (1, 16), "k": (1, 16), "v": (2, 16), "g": (2,), "level_scales": (2, 7)} | (
        {"beta": (2,)} if delta else {}
    )
    with recording(lambda launch: fakes.append(Compiled(launch.kernel.fn.__name__)) or fakes[-1]) as launches:
        for _ in range(2):
            x = {name: torch.zeros(1, 300, *size) for name, size in sizes.items()}
            options = {"cu_seqlens": torch.tensor([0, 100, 300])} if packed else {}
            (o,) = module.forward(**x, **options)
            module.backward(o, **x, **options)
    for recorded, fake in zip(launches, fakes, strict=True):
        (call,) = fake.calls
        given, wanted = call[2:], source(recorded).signature.values()
        assert len(given) == len(wanted)
        for value, kind in zip(given, wanted):
            assert fits(value, kind), f"{value} for {kind} of {fake.name}"


def fits(value, kind) -> bool:
    """Whether Triton's launcher takes a value for a type of a signature: an int for a pointer, a tuple for a bundle."""
    if isinstance(kind, tuple):
        return isinstance(value, tuple) and len(value) == len(kind) and all(map(fits, value, kind))
    return kind == "constexpr" or type(value) is (float if kind == "fp32" else int)


def test_another_kind_is_recorded_anew(host):
    first, second = Kernel("x", "middle", "factor", "SIZE"), Kernel("middle", "y", "result", "SIZE")
    function = two_stages(first, second)
    x = torch.zeros(4)
    for inputs, factor in (([x, x], 1.0), ([x, x], 2.0), ([torch.zeros(5), x], 1.0), ([x, torch.zeros(8)[::2]], 1.0)):
        replay(function, inputs, factor)
    assert first.launches == 4
    replay(function, [x, x], 2.0)
    assert first.launches == 4


@pytest.mark.parametrize("delta", [False, True], ids=["scalar", "delta"])
def test_a_step_is_repeated_on_another_state(host, monkeypatch, delta):
    """Its launches, with the addresses of the new inputs and the new state; another number of tokens is another kind."""
    from loglinear.kernels.decoding import host as steps
    from loglinear.kernels.decoding.open_chunk import Held

    bundles = {"x": steps.Inputs, "held": Held, "S": steps.Sizes}
    parts = ("carried_token", "carried_step", "carried_close") if delta else ("scalar_step",)
    real = {part: getattr(steps, f"{part}_kernel") for part in parts}
    kernels = {part: Kernel(*kernel.arg_names) for part, kernel in real.items()}
    for part, kernel in kernels.items():
        monkeypatch.setattr(steps, f"{part}_kernel", kernel)

    def call(tokens):
        state = DecodingState.empty(2, 4, 2, 16, 8, 512, torch.float32, delta_rule=delta)
        x = {"q": torch.zeros(2, tokens, 2, 16), "k": torch.zeros(2, tokens, 2, 16), "v": torch.zeros(2, tokens, 4, 8)}
        x |= {"g": torch.zeros(2, tokens, 4)} | ({"beta": torch.zeros(2, tokens, 4)} if delta else {})
        x["level_scales"] = scales = torch.zeros(2, tokens, 4, 11)
        o = steps.step(**x, state=state, scale=0.5)
        del x["level_scales"]
        return (
            x | {"o": o, "scales": scales} | {key: y for key, y in vars(state).items() if isinstance(y, torch.Tensor)}
        )

    call(1)
    assert all((kernel.launches, kernel.compiled.calls) == (1, []) for kernel in kernels.values())
    wanted = {key: y.data_ptr() for key, y in call(1).items()}
    wanted |= {"T": 1, "L": 11, "M": 4, "factor": 0.5, "H": 4, "G": 2, "K": 16, "V": 8, "C": 64}
    found = {}
    for part, kernel in kernels.items():
        assert kernel.launches == 1
        (given,) = kernel.compiled.calls
        arguments: dict = {}
        for name, value in zip(real[part].arg_names, given[2:]):
            arguments |= dict(zip(bundles[name]._fields, value)) if name in bundles else {name: value}
        for key in wanted.keys() & arguments.keys():
            assert arguments[key] == wanted[key], f"{key} of {part}"
        for key in {"reach", "read"} & arguments.keys() & found.keys():  # scratch that one launch leaves to another
            assert arguments[key] == found[key], f"{key} of {part}"
        found |= arguments
    assert wanted.keys() <= found.keys()
    call(2)
    assert [kernel.launches for kernel in kernels.values()] == ([2, 3, 2] if delta else [2])


def foreign(x, inputs):
    """Memory that is neither an input nor scratch."""
    return x.clone()


def replaced(x, inputs):
    """An input that the function replaces: a plan would take the next call's own, of another dtype, for the one it made."""
    inputs[0] = x.float()
    return inputs[0]


@pytest.mark.parametrize("argument", [foreign, replaced])
def test_what_can_not_be_repeated_runs_every_time(host, argument):
    kernel = Kernel("x", "SIZE")

    def function(inputs):
        (x,) = inputs
        launch(kernel, 1, argument(x, inputs), SIZE=1)
        return (scratch((1,), torch.float32, x.device),)

    for count in range(1, 4):
        replay(function, [torch.zeros(3, dtype=torch.bfloat16)])
        assert kernel.launches == count
    assert not kernel.compiled.calls


def test_an_error_leaves_no_recording_behind(host):
    def fails(inputs):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        replay(fails, [torch.zeros(1)])
    assert launching.recording() is None


def test_scratch_shares_memory_only_if_no_launch_needs_both():
    sizes, lives = (300, 40, 500, 300, 1, 700), ((0, 1), (0, 5), (1, 2), (2, 3), (3, 3), (4, 5))
    pieces = [plan.Life(number, *life) for number, life in enumerate((size, *life) for size, life in zip(sizes, lives))]
    offsets, total = plan.lay_out(pieces)
    for a, b in itertools.combinations(pieces, 2):
        if a.first <= b.last and b.first <= a.last:
            begin, other = offsets[a.number], offsets[b.number]
            assert begin + a.size <= other or other + b.size <= begin
    assert all(offsets[x.number] % plan.ALIGNMENT == 0 and offsets[x.number] + x.size <= total for x in pieces)
    assert total == 1064  # what launch 1 needs, 300, 40 and 500 bytes, the first two of them aligned


def test_results_go_where_they_are_wanted():
    """All of them, if they are as large as the places; otherwise none."""
    layouts = [((2, 3), torch.float32), None, ((4,), torch.bfloat16)]
    places = [torch.empty(2, 3), torch.empty(4, dtype=torch.bfloat16)]
    with launching.into(places):
        first, none, second = launching.results(layouts, torch.device("cpu"))
        other = launching.results([*layouts[:2], ((5,), torch.bfloat16)], torch.device("cpu"))
    assert first is places[0]
    assert none is None
    assert second is places[1]
    assert other[0].data_ptr() != places[0].data_ptr()
    assert other[2].shape == (5,)
    assert launching.results(layouts, torch.device("cpu"))[0] is not places[0]
