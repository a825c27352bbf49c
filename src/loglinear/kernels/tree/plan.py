"""PLAN: the record of a call, and what its record becomes: launches that can be repeated (launching.py).

The arguments of launches and the descriptors of TMA depend on addresses. They are made once for each set of addresses, for
PyTorch gives the same ones out again and again.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from inspect import getclosurevars
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loglinear.kernels.tree.bundles import members_of

ALIGNMENT = 256  # bytes, of every piece of scratch


@dataclass(frozen=True)
class Place:
    """An address: a tensor, by its number (inputs first, then scratch), and the bytes to skip."""

    number: int
    offset: int


@dataclass(frozen=True)
class Described(Place):
    """The address of a tensor descriptor's tensor, and what a launcher asks of the descriptor besides.

    encoding: how a kernel wants it encoded; None if the launcher does so itself with every launch.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    settings: tuple[Any, ...]
    encoding: Any = None


class Descriptor:
    """Stands for a tensor descriptor, and for the tensor, of which a launcher asks the address alone."""

    __slots__ = ("address", "base", "padding", "round_f32_to_tf32", "shape", "strides")

    def __init__(self, form: Described, address: int) -> None:
        self.base, self.address, self.shape, self.strides = self, address, form.shape, form.strides
        self.padding, self.round_f32_to_tf32 = form.settings

    def data_ptr(self) -> int:
        return self.address


class Life(NamedTuple):
    """A piece of scratch: its number, its bytes, and the first and the last launch that take it."""

    number: int
    size: int
    first: int
    last: int


@dataclass
class Recording:
    """The record of a running call: scratch as (address, bytes), and launches as (kernel, programs, arguments)."""

    inputs: tuple[Tensor | None, ...]
    scratch: list[tuple[int, int]] = field(default_factory=list)
    launches: list[tuple[Any, int, list]] = field(default_factory=list)
    complete: bool = True

    def allocated(self, x: Tensor) -> None:
        self.scratch.append((x.data_ptr(), max(x.numel() * x.element_size(), 1)))

    def launched(self, compiled: Any, programs: int, arguments: list) -> None:
        """Note a launch. The interpreter compiles nothing: ``compiled`` is None there, and nothing can be repeated."""
        placed = [tuple(map(self.place, x)) if isinstance(x, tuple) else self.place(x) for x in arguments]
        self.complete = self.complete and compiled is not None
        if self.complete:
            self.launches.append((compiled, programs, placed))

    def place(self, x: Any) -> Any:
        """The place of a tensor, and anything else as it is. Memory that is no input's and no scratch ends the record."""
        if hasattr(x, "block_shape"):  # a tensor descriptor, of a class that not every Triton has
            place, settings = self.place(x.base), (x.padding, getattr(x, "round_f32_to_tf32", False))
            forms = tuple(x.shape), tuple(x.strides), settings
            return None if place is None else Described(place.number, place.offset, *forms)
        if not isinstance(x, Tensor):
            return x
        address, count = x.data_ptr(), len(self.inputs)
        same = [i for i, y in enumerate(self.inputs) if y is x]
        if same:
            return Place(same[0], 0)
        for number in reversed(range(len(self.scratch))):  # the newest first: memory is given out again
            begin, size = self.scratch[number]
            if begin <= address < begin + size:
                return Place(count + number, address - begin)
        # A part of exactly one input: inputs of the next call may share no memory where inputs of this call do.
        owners = [
            Place(i, address - y.data_ptr()) for i, y in enumerate(self.inputs) if y is not None and spans(y, address)
        ]
        self.complete = self.complete and len(owners) == 1
        return owners[0] if owners else None

    def plan(self, results: tuple[Tensor | None, ...]) -> Plan | None:
        """The plan; None if a launch or a result used memory that is neither an input's nor whole scratch."""
        places = [self.place(x) for x in results]
        whole = all(x is None or (x.offset == 0 and x.number >= len(self.inputs)) for x in places if self.complete)
        if not (self.complete and whole):
            return None
        return Plan(
            self, [(None, None) if x is None else (p.number, (x.shape, x.dtype)) for x, p in zip(results, places)]
        )

    def lives(self, without: list[int | None]) -> list[Life]:
        """The lives of the scratch that launches take, without some numbers."""
        found: dict[int, Life] = {}
        for step, (*_, arguments) in enumerate(self.launches):
            for x in members_of(arguments):
                if isinstance(x, Place) and x.number >= len(self.inputs) and x.number not in without:
                    size = self.scratch[x.number - len(self.inputs)][1]
                    found[x.number] = found.get(x.number, Life(x.number, size, step, step))._replace(last=step)
        return list(found.values())


def spans(x: Tensor, address: int) -> bool:
    """Whether the address lies between the first and the last element of x."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.numel() > 0 and x.data_ptr() <= address <= x.data_ptr() + last * x.element_size()


def lay_out(lives: list[Life]) -> tuple[dict[int, int], int]:
    """(offset of each piece by its number, bytes of all). Pieces share bytes if no launch lies in the lives of both."""
    placed: list[tuple[int, int, Life]] = []  # (begin, end, piece)
    for life in sorted(lives, key=lambda x: -x.size):
        begin = 0
        for other_begin, other_end, other in sorted(placed):
            if life.first <= other.last and other.first <= life.last and begin + life.size > other_begin:
                begin = max(begin, -(-other_end // ALIGNMENT) * ALIGNMENT)
        placed.append((begin, begin + life.size, life))
    return {life.number: begin for begin, _, life in placed}, max((end for _, end, _ in placed), default=0)


@dataclass(frozen=True)
class Start:
    """The start of a kernel. ``encode`` encodes its descriptors; it is None where ``run`` does so, in 1 to 3 µs for each.

    ``run`` is the launcher below ``compiled[grid]``, which makes a dictionary of all arguments for profilers with each launch
    (Triton 3.6). For a kernel with descriptors it is a function of Triton's that encodes them around one that launches.
    """

    run: Callable
    encode: Callable[[Descriptor, Any], list] | None = None
    encodings: tuple[Any, ...] = ()

    @classmethod
    def of(cls, compiled: Any, descriptors: int) -> Start:
        if not (descriptors and hasattr(compiled.run, "launch")):
            return cls(compiled.run)
        known = getclosurevars(compiled.run.launch)
        encode, parts = known.globals.get("make_tensordesc_arg"), known.nonlocals
        encodings = parts.get("tensordesc_meta") or ()
        if encode is None or "launcher" not in parts or len(encodings) != descriptors:
            return cls(compiled.run)
        run = copy(compiled.run)
        run.launch = parts["launcher"]
        return cls(run, encode, tuple(encodings))

    def encoded(self, arguments: list) -> list:
        """The arguments, whose descriptors know how they are encoded."""
        encodings = iter(self.encodings)
        described = [isinstance(x, Described) and self.encode is not None for x in arguments]
        return [replace(x, encoding=next(encodings)) if new else x for x, new in zip(arguments, described)]


def picker(indices: list[int]) -> Callable[[list], tuple]:
    """``pick(table)``: the elements of a list at these indices. ``itemgetter`` gives no tuple for one index alone."""
    return itemgetter(*indices) if len(indices) > 1 else lambda table: tuple(table[i] for i in indices)


class Plan:
    """A call of one kind, ready to be repeated.

    ``table`` has the arguments of all launches, each once. The addresses of a call's tensors are written into a copy, then the
    descriptors and bundles that hold addresses, and each launch picks its own. Results are allocated one by one, all other
    scratch as one piece of memory.
    """

    def __init__(
        self, note: Recording, results: list[tuple[int | None, tuple[torch.Size, torch.dtype] | None]]
    ) -> None:
        numbers = [number for number, _ in results]
        self.results = [layout for _, layout in results]
        self.offsets, self.scratch = lay_out(note.lives(numbers))
        self.tensors = [*range(len(note.inputs)), *numbers]
        self.addresses: list[list[tuple[int, int]]] = [[] for _ in (*self.tensors, "memory")]  # (index, offset)
        self.made: list[tuple[int, Callable[[list], Any]]] = []  # (index, what is made of others in the table)
        self.table: list = []
        self.indices: dict[Any, int] = {}
        self.launches: list[tuple[Callable, int, Any, Any, Callable[[list], tuple]]] = []
        for compiled, programs, arguments in note.launches:
            compiled[(programs, 1, 1)]  # loads the kernel's code onto the device
            start = Start.of(compiled, sum(isinstance(x, Described) for x in arguments))
            pick = picker([self.index(x, start) for x in start.encoded(arguments)])
            self.launches.append((start.run, programs, compiled.function, compiled.packed_metadata, pick))

    def index(self, x: Any, start: Start) -> int:
        """The index in the table of an argument: a value, a place, a descriptor or a bundle."""
        bundle = isinstance(x, tuple) and any(isinstance(y, Place) for y in x)
        # 1, 1.0 and True are equal, but not as arguments
        key = tuple(self.index(y, start) for y in x) if bundle else repr(x)
        if key in self.indices:
            return self.indices[key]
        found = self.indices[key] = len(self.table)
        self.table.append(None if bundle or isinstance(x, Place) else x)
        if isinstance(x, Place):
            own = self.tensors.index(x.number) if x.number in self.tensors else -1
            self.addresses[own].append((found, x.offset + self.offsets.get(x.number, 0)))
        if bundle:
            self.made.append((found, picker(list(key))))
        elif isinstance(x, Described):
            encode = start.encode if x.encoding else None
            self.made.append((found, lambda table: described(x, table[found], encode)))
        return found


def described(x: Described, address: int, encode: Callable[[Descriptor, Any], list] | None) -> Any:
    """A descriptor as a launcher takes it: a list of arguments where it is encoded."""
    found = Descriptor(x, address)
    return found if encode is None else encode(found, x.encoding)


@lru_cache(maxsize=4096)
def placed(plan: Plan, *addresses: int) -> list[tuple[Callable, int, Any, Any, list]]:
    """The launches of a plan with all their arguments, for tensors at these addresses."""
    table = plan.table.copy()
    for base, places in zip(addresses, plan.addresses):
        for index, offset in places:
            table[index] = base + offset
    for index, make in plan.made:
        table[index] = make(table)

    def arguments(pick: Callable[[list], tuple]) -> list:
        return [y for x in pick(table) for y in (x if isinstance(x, list) else (x,))]

    return [(*launch, arguments(pick)) for *launch, pick in plan.launches]  # type: ignore[misc]
