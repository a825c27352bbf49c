"""REPLAY: the first call of a kind is recorded while it runs, and later calls repeat its launches from one allocation.

Below some thousand tokens the host is slower than the GPU. The host works out sizes, allocates thirty tensors, and Triton
checks every argument of every launch. This work takes ten times as long as the launches themselves and depends on dtypes,
shapes, strides and alignments alone. It is therefore done once for each kind of call. Scratch tensors that are never alive
at the same time share memory. The kernels of a call run one after the other, or in two lanes side by side (``two_lanes``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes, of every buffer in the arena
_local = threading.local()


@dataclass
class Buffer:
    """Scratch of a recorded call, alive from launch ``first`` to launch ``last``. Sizes and addresses in bytes.

    lanes: the lanes of the launches that use it. beside: whether one of these may run beside launches of the other lane.
    """

    address: int
    size: int
    first: int
    last: int = -1
    offset: int = 0
    lanes: set[int] = field(default_factory=set)
    beside: bool = False

    def holds(self, address: int) -> bool:
        return self.address <= address < self.address + max(self.size, 1)

    def meets(self, other: Buffer) -> bool:
        """Whether both buffers may be alive at the same time."""
        if self.last < 0 or other.last < 0:
            return False
        together = self.first <= other.last and other.first <= self.last
        return together or (self.beside and other.beside and self.lanes != other.lanes)


@dataclass
class Launch:
    """One launch: the compiled kernel, the ``members_of`` its arguments, and where addresses go: (index among the members,
    input or buffer, bytes after it).
    """

    compiled: Any
    programs: int
    lane: int
    members: list
    parts: list[int | slice]
    places: list[tuple[int, int | Buffer, int]]


@dataclass
class Recording:
    """The record of a running call. Inputs are known by identity, or their parts by address; scratch by address."""

    inputs: list[Tensor | None]
    buffers: list[Buffer] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    complete: bool = True
    lane: int = 0
    fork: int = -1  # the first launch of the lanes, if there are any
    join: int = -1  # the first launch after them

    def allocated(self, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        self.buffers.append(Buffer(tensor.data_ptr(), size, len(self.launches)))

    def find(self, tensor: Tensor) -> Buffer | None:
        """The newest buffer that holds the tensor: memory of an older buffer may have been given out again."""
        return next((b for b in reversed(self.buffers) if b.holds(tensor.data_ptr())), None)

    def place(self, tensor: Tensor) -> tuple[int | Buffer, int] | None:
        """(number of the input or buffer that the tensor is a part of, bytes before it); None if not exactly one fits."""
        given = next((i for i, x in enumerate(self.inputs) if x is tensor), None)
        if given is not None:
            return given, 0
        buffer = self.find(tensor)
        if buffer is not None:
            return buffer, tensor.data_ptr() - buffer.address
        # A part of exactly one input: inputs of the next call may share no memory where inputs of this call do.
        owners = [i for i, x in enumerate(self.inputs) if x is not None and spans(x, tensor.data_ptr())]
        if len(owners) != 1:
            return None
        return owners[0], tensor.data_ptr() - self.inputs[owners[0]].data_ptr()  # type: ignore[union-attr]

    def launched(self, compiled, programs: int, arguments: Sequence, constants: list) -> None:
        """Note a launch. The interpreter compiles nothing, so there ``compiled`` is None and nothing can be repeated."""
        places: list[tuple[int, int | Buffer, int]] = []
        members, parts = members_of(arguments)
        for index, member in enumerate(members):
            if not isinstance(member, Tensor):
                continue
            place = self.place(member)
            if place is None:
                self.complete = False
                continue
            if isinstance(place[0], Buffer):
                place[0].last = len(self.launches)
                place[0].lanes.add(self.lane)
            places.append((index, *place))
            members[index] = 0
        if compiled is None:
            self.complete = False
        elif self.complete:
            parts += range(len(members), len(members) + len(constants))
            self.launches.append(Launch(compiled, programs, self.lane, members + constants, parts, places))

    def finish(self, results: tuple[Tensor | None, ...]) -> Tape | None:
        """The tape, or None where a launch or a result used memory that is neither an input's nor scratch."""
        kept = [None if x is None else self.find(x) for x in results]
        whole = all(x is None or (b is not None and b.address == x.data_ptr()) for x, b in zip(results, kept))
        if not (self.complete and whole):
            return None
        bases = {id(b): len(self.inputs) + i for i, b in enumerate(kept) if b is not None}
        transient = [b for b in self.buffers if id(b) not in bases]
        for buffer in transient:
            self._note_lanes(buffer)
        arena = lay_out(transient)
        last = len(self.inputs) + len(kept)
        launches = []
        for launch in self.launches:
            addresses = []
            for index, where, offset in launch.places:
                if isinstance(where, Buffer):
                    offset += 0 if id(where) in bases else where.offset
                    where = bases.get(id(where), last)
                addresses.append((index, where, offset))
            start = starter(launch.compiled, launch.programs)
            launches.append((start, launch.lane, launch.members, launch.parts, addresses))
        shapes = [None if x is None else (x.shape, x.dtype) for x in results]
        return Tape(shapes, arena, launches, self.fork, self.join)

    def _note_lanes(self, buffer: Buffer) -> None:
        """A buffer of both lanes is alive as long as they are: neither knows how far the other has come."""
        buffer.beside = buffer.first < self.join and buffer.last >= self.fork >= 0
        if buffer.beside and len(buffer.lanes) > 1:
            buffer.first, buffer.last = min(buffer.first, self.fork), max(buffer.last, self.join - 1)


def members_of(arguments: Sequence) -> tuple[list, list[int | slice]]:
    """The arguments with the members of each bundle in its place, and where each argument is in this list.

    Triton's launcher takes a bundle as a tuple. A bundle holds no other bundle.
    """
    members: list = []
    parts: list[int | slice] = []
    for x in arguments:
        first = len(members)
        if isinstance(x, tuple):
            members += x
            parts.append(slice(first, len(members)))
        else:
            members.append(x)
            parts.append(first)
    return members, parts


def spans(x: Tensor, address: int) -> bool:
    """Whether the address lies between the first and the last element of x."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.numel() > 0 and x.data_ptr() <= address <= x.data_ptr() + last * x.element_size()


def lay_out(buffers: list[Buffer]) -> int:
    """Give each buffer the lowest offset that is free of those it ``meets``. Returns the bytes needed."""
    placed: list[Buffer] = []
    for buffer in buffers:
        neighbours = sorted((b for b in placed if b.meets(buffer)), key=lambda b: b.offset)
        for other in neighbours:
            if buffer.offset + buffer.size <= other.offset:
                break
            buffer.offset = max(buffer.offset, -(-(other.offset + other.size) // ALIGNMENT) * ALIGNMENT)
        placed.append(buffer)
    return max((b.offset + b.size for b in placed), default=0)


def starter(compiled, programs: int) -> Callable:
    """``start(stream, arguments)``: Triton's own launcher, without the search for the stream and the hooks of profilers."""
    compiled[(programs, 1, 1)]  # loads the kernel's code onto the device
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def start(stream: int, arguments: list) -> None:
        run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments)

    return start


def arena(size: int, device: torch.device) -> Tensor:
    """Memory for all scratch of a replayed call. Tests fill it with NaN."""
    return torch.empty(size, dtype=torch.uint8, device=device)


@dataclass
class Tape:
    """A call of one kind, ready to be repeated: its results' shapes, bytes of scratch, and launches."""

    results: list[tuple[torch.Size, torch.dtype] | None]
    scratch: int
    launches: list[tuple[Callable, int, list, list[int | slice], list[tuple[int, int, int]]]]
    fork: int
    join: int

    def play(self, inputs: list[Tensor | None], device: torch.device) -> tuple[Tensor | None, ...]:
        results = [None if x is None else torch.empty(x[0], dtype=x[1], device=device) for x in self.results]
        memory = arena(self.scratch, device) if self.scratch else None
        base = [0 if x is None else x.data_ptr() for x in (*inputs, *results, memory)]
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        streams = [stream] if self.fork < 0 else [stream, second_stream(device).cuda_stream]
        for number, (start, lane, members, parts, addresses) in enumerate(self.launches):
            if number == self.fork:
                second_stream(device).wait_stream(torch.cuda.current_stream(device))
            elif number == self.join:
                torch.cuda.current_stream(device).wait_stream(second_stream(device))
            members = members.copy()
            for index, where, offset in addresses:
                members[index] = base[where] + offset
            given = tuple(members)
            start(streams[lane], [given[part] for part in parts])
        if self.join == len(self.launches):
            torch.cuda.current_stream(device).wait_stream(second_stream(device))
        return tuple(results)


@lru_cache(maxsize=512)
def tape_of(*kind) -> list[Tape | None]:
    """The tape of one kind of call, in a list: empty until there is a tape, ``[None]`` if the call cannot be repeated."""
    return []


def recording() -> Recording | None:
    """The recording of this thread, if a call is being recorded."""
    return getattr(_local, "recording", None)


def second_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of lane 1, one for each thread and device."""
    streams = _local.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


@contextmanager
def two_lanes() -> Iterator[Callable[[int], None]]:
    """Yields a function ``choose(lane)``. Within the block, launches belong to the lane, 0 or 1, that it chose last.

    The lanes are repeated on two streams: while a kernel of one lane runs out of programs or waits for memory, a kernel of
    the other lane has work. No launch of one lane may therefore read memory that a launch of the other lane writes. Each
    lane takes its own scratch. A call may use this once.
    """
    note = recording() or Recording([])
    assert note.fork < 0
    note.fork = len(note.launches)

    def choose(lane: int) -> None:
        note.lane = lane

    yield choose
    note.lane, note.join = 0, len(note.launches)


def replay(
    function: Callable[..., tuple[Tensor | None, ...]], inputs: list[Tensor | None], *settings
) -> tuple[Tensor | None, ...]:
    """``function(inputs, *settings)``, from its tape if there is one.

    Args:
        function: allocates and launches by ``launching``, and does nothing else on the device. Its
            results are whole scratch buffers.
        inputs: at least one tensor; all on one device. settings: hashable; with the inputs' dtypes, shapes, strides and
            alignment they decide all that the function does.
    """
    device = next(x for x in inputs if x is not None).device
    kind = [None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in inputs]
    tapes = tape_of(function, device, *settings, *kind)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _run(tapes, function, inputs, settings, device)
    return _run(tapes, function, inputs, settings, device)


def _run(tapes, function, inputs, settings, device):
    if not tapes:
        # Two inputs may be one tensor here and two tensors in the next call: each gets an identity of its own.
        own = [None if x is None else x.detach() for x in inputs]
        _local.recording = note = Recording(own)
        try:
            results = function(own, *settings)
        finally:
            _local.recording = None
        tapes.append(note.finish(results))
        return results
    if tapes[0] is None:
        return function(inputs, *settings)
    return tapes[0].play(inputs, device)
