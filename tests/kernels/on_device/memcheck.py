"""MEMCHECK: every load and store of every kernel, in Triton's interpreter, against the tensors that its launch was given.

An access is right if it meets an element of one of the launch's tensors. Their storage alone is not enough: the gaps between
the heads of a slice, and the rest of a larger buffer, are out of bounds. The check runs a sample of the programs. Addresses
follow from program numbers, strides and tables of the host, never from the results of a kernel, so a program may be left out
without a change of the other programs' addresses. Accesses out of bounds are noted and not made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from loglinear.kernels.tree.bundles import members_of


@dataclasses.dataclass(frozen=True)
class Violation:
    """Elements that one instruction of one program touches outside of the launch's tensors."""

    kernel: str
    kind: str
    program: int
    count: int

    def __str__(self) -> str:
        return f"{self.kernel}, program {self.program}: a {self.kind} of {self.count} elements out of bounds"


@dataclasses.dataclass
class Report:
    """What was checked: programs run and elements accessed, by kernel; and what was out of bounds."""

    programs: Counter[str] = dataclasses.field(default_factory=Counter)
    elements: Counter[str] = dataclasses.field(default_factory=Counter)
    violations: list[Violation] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        first = "\n".join(str(violation) for violation in self.violations[:10])
        total: Counter[tuple[str, str]] = Counter()
        for violation in self.violations:
            total[violation.kernel, violation.kind] += violation.count
        return f"{first}\nin all: {dict(total)}"


class Region:
    """The elements of one tensor, by address."""

    def __init__(self, tensor: Tensor) -> None:
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
        mine = torch.zeros(span, dtype=torch.bool)
        mine.as_strided(tensor.shape, tensor.stride()).fill_(True)
        self.first, self.width, self.mine = tensor.data_ptr(), tensor.element_size(), mine.numpy()

    def holds(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Which addresses are those of an element of ``width`` bytes of the tensor."""
        index, rest = np.divmod(addresses - self.first, self.width)
        inside = (index >= 0) & (index < len(self.mine)) & (rest == 0) & (width == self.width)
        return inside & self.mine[np.where(inside, index, 0)]


@dataclasses.dataclass
class Launch:
    """The launch that runs: its name, the elements that it may touch, its number of programs, and which of them run."""

    name: str
    regions: list[Region]
    programs: int
    sample: list[int]


def sampled(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` programs: the first, the last, and a choice between that is always the same."""
    if count <= most:
        return list(range(count))
    ends = [*range(most // 3), *range(count - most // 3, count)]
    between = range(most // 3, count - most // 3)
    return sorted(ends + random.Random(count).sample(between, most - len(ends)))


def scalar(value: int) -> Any:
    """An int32 as the interpreter has it."""
    return interpreter.TensorHandle(np.array([value], dtype=np.int32), interpreter.tl.int32)


class Memcheck:
    """Stands in for parts of the interpreter: ``run`` for a launch, the others for what its programs do."""

    def __init__(self, programs: int) -> None:
        self.most = programs
        self.report = Report()
        self.launch = Launch("", [], 0, [])
        builder = interpreter.InterpreterBuilder
        self.load, self.store = builder.create_masked_load, builder.create_masked_store
        self.call = interpreter.GridExecutor.__call__

    def program(self, builder: Any) -> int:
        return self.launch.sample[builder.grid_idx[0]]

    def within(self, builder: Any, kind: str, pointers: Any, mask: Any) -> Any:
        """The mask without what lies out of bounds, which is noted."""
        wanted = np.broadcast_to(np.asarray(mask.data, dtype=bool), pointers.data.shape)
        addresses = pointers.data[wanted].astype(np.int64)
        width = pointers.get_element_ty().primitive_bitwidth // 8
        right = np.zeros(addresses.shape, dtype=bool)
        for region in self.launch.regions:
            if not right.all():
                right |= region.holds(addresses, width)
        self.report.elements[self.launch.name] += addresses.size
        if right.all():
            return mask
        count = int((~right).sum())
        self.report.violations.append(Violation(self.launch.name, kind, self.program(builder), count))
        rest = np.zeros(wanted.shape, dtype=bool)
        rest[wanted] = right
        return interpreter.TensorHandle(rest, mask.dtype)

    def run(self, executor: Any, *arguments: Any, **constants: Any) -> None:
        """A launch of one axis, of a sample of its programs."""
        (count,) = executor.grid
        tensors = [x for x in members_of((*arguments, *constants.values())) if isinstance(x, Tensor) and x.numel()]
        self.launch = Launch(executor.fn.__name__, [Region(x) for x in tensors], count, sampled(count, self.most))
        self.report.programs[self.launch.name] += len(self.launch.sample)
        executor.grid = (len(self.launch.sample),)
        self.call(executor, *arguments, **constants)

    def replacements(self) -> list:
        """The patches, as context managers."""
        check = self

        def load(self, pointers, mask, other, *rest):
            return check.load(self, pointers, check.within(self, "load", pointers, mask), other, *rest)

        def store(self, pointers, value, mask, *rest):
            return check.store(self, pointers, value, check.within(self, "store", pointers, mask), *rest)

        def program_id(self, axis):
            return scalar(check.program(self) if axis == 0 else 0)

        def num_programs(self, axis):
            return scalar(check.launch.programs if axis == 0 else 1)

        def atomic(self, *arguments):
            raise NotImplementedError("memcheck does not see atomics; no kernel here has any")

        patches = {"masked_load": load, "masked_store": store, "atomic_rmw": atomic, "atomic_cas": atomic}
        patches |= {"get_program_id": program_id, "get_num_programs": num_programs}
        builder = {f"create_{name}": function for name, function in patches.items()}
        launch = mock.patch.object(interpreter.GridExecutor, "__call__", lambda *x, **options: check.run(*x, **options))
        return [mock.patch.multiple(interpreter.InterpreterBuilder, **builder), launch]


@contextlib.contextmanager
def memcheck(programs: int = 1 << 30) -> Iterator[Report]:
    """Checks all launches inside, of each at most ``programs`` programs; then their results are not to be used.

    Needs ``TRITON_INTERPRET=1`` and tensors on the CPU. Raises nothing: the report is the caller's to judge.
    """
    check = Memcheck(programs)
    with contextlib.ExitStack() as stack:
        for replacement in check.replacements():
            stack.enter_context(replacement)
        yield check.report
