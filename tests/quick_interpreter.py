"""Triton's interpreter at a third of its time, with the same results: what it finds out again and again, it finds out once."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from types import SimpleNamespace
from typing import Any

from triton._utils import validate_block_shape
from triton.language import core
from triton.runtime import interpreter


@cache
def shape_of(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """``shape`` and ``numel`` of a tensor."""
    return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))


@cache
def block_of(sizes: tuple[int, ...], element: str) -> tuple[Any, int, str]:
    """``shape``, ``numel`` and ``name`` of the type of a block."""
    return core.tuple(sizes), validate_block_shape(sizes), f"<{core.tuple(sizes)}, {element}>"


def tensor(self: Any, handle: Any, type: Any) -> None:
    """``tl.tensor(handle, type)``."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = shape_of(tuple(type.shape) if type.is_block() else ())


def block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """``tl.block_type(element_ty, shape)``."""
    self.element_ty = element_ty
    sizes = tuple(core._unwrap_if_constexpr(size) for size in core._unwrap_if_constexpr(shape))
    self.shape, self.numel, self.name = block_of(sizes, element_ty.name)


def install() -> None:
    """Changes the interpreter of this process, for good.

    Triton's language becomes the interpreter's here, no longer at every call of a function. Sums are not computed a second
    time in 64 bits: without Triton's debug option, nothing looks at those.
    """
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": interpreter.tl, "core": core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    core.tensor.__init__, core.block_type.__init__ = tensor, block_type
    numpy_of, pointers = cache(interpreter._get_np_dtype), interpreter._get_np_dtype(core.pointer_type(core.float32))
    interpreter._get_np_dtype = lambda type: pointers if type.scalar.is_ptr() else numpy_of(type.scalar)
