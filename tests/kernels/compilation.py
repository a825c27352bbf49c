"""Compile the launches of a host function for a GPU that is not there, and read the compiler's report on each.

The launches are recorded from the real host code on meta tensors, so a signature here cannot differ from a signature on a
device.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from overtaking import overtaken
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
    torch.float64: "fp64",
}  # fmt: skip


@dataclass(frozen=True)
class Recorded:
    """One launch: the kernel, its arguments by name and its launch options."""

    kernel: JITFunction
    arguments: dict
    options: dict
    grid: tuple[int, ...]


@dataclass(frozen=True)
class Resources:
    """What the compiler reports of one kernel on one target. registers and spills are None where it does not say.

    ``overtaken``: products that may read a tile too late (see overtaking.py).
    """

    name: str
    target: str
    registers: int | None
    spills: int | None
    shared: int
    warps: int
    overtaken: tuple[str, ...] = ()


@contextmanager
def recording(compiled: Callable[[Recorded], object] = lambda launch: None):
    """Within this context kernels are not launched but listed. ``compiled`` makes what stands for a compiled kernel."""
    launches: list[Recorded] = []

    def run(self, *args, grid, warmup, **kwargs):
        names = [p.name for p in self.params]
        options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
        launches.append(Recorded(self, dict(zip(names, args)) | kwargs, options, grid))
        return compiled(launches[-1])

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def record(function: Callable, *args, **kwargs) -> list[Recorded]:
    with recording() as launches:
        function(*args, **kwargs)
    return launches


def specialised(value, path: tuple[int, ...], constants: dict, attributes: dict):
    """The type of an argument, or of a bundle's members, as Triton's own launcher would specialise it: None and ints of 1 are
    constants, multiples of 16 are marked."""
    if isinstance(value, tuple):
        return type(value)(*(specialised(x, (*path, i), constants, attributes) for i, x in enumerate(value)))
    if hasattr(value, "block_shape"):  # a tensor descriptor: Triton's name of its type
        block = ", ".join(map(str, value.block_shape))
        return f"tensordesc<{TYPES[value.base.dtype]}[{block}],{value.layout!r}>"
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, torch.Tensor) or value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "i32" if abs(value) < 2**31 else "i64"


def source(launch: Recorded) -> ASTSource:
    """The kernel with the types of a launch."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        else:
            signature[parameter.name] = specialised(value, (index,), constants, attributes)
    kind = ASTSource
    if launch.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as kind  # not in every Triton
    return kind(launch.kernel, signature, constants, attributes)


def build(launch: Recorded, target: GPUTarget) -> tuple[Resources, object]:
    compiled = triton.compile(source(launch), target=target, options=dict(launch.options))
    registers = spills = None
    if target.backend == "cuda":
        registers, spills = cubin_usage(compiled.asm["cubin"])
    else:
        text = compiled.asm["amdgcn"]
        registers = max(int(x) for x in re.findall(r"\.vgpr_count:\s+(\d+)", text))
        spills = max(int(x) for x in re.findall(r"\.vgpr_spill_count:\s+(\d+)", text))
    name = launch.kernel.fn.__name__
    metadata = compiled.metadata
    machine, late = f"{target.backend}:{target.arch}", tuple(overtaken(compiled.asm["ttgir"]))
    return Resources(name, machine, registers, spills, metadata.shared, metadata.num_warps, late), compiled


def built(launches: list[Recorded], target: GPUTarget) -> list[Resources]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # triton 3.9 announces a changed default for 3.10
        return [build(launch, target)[0] for launch in launches]


def cubin_usage(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of local memory a thread), read by the cuobjdump that Triton carries."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])
