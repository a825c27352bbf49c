"""FOREIGN: the PyTorch ops, and on a GPU their Triton kernels, as a call inside of a JAX program.

XLA's typed foreign function interface (FFI) hands a function the addresses of its buffers, and on a GPU its stream. The
function here makes PyTorch tensors of the addresses, without copies, and runs the op on that stream. Its kernels write
into XLA's buffers, from the second call of a kind on. The derivative is a second such call; what kernels keep for it, XLA
keeps between the two. PyTorch's allocator and XLA's share the device: ``XLA_PYTHON_CLIENT_PREALLOCATE=false`` leaves
memory to PyTorch.

The structures are those of ``xla/ffi/api/c_api.h`` (version 0.3 and 0.4), of which the fields that follow are not read.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from ctypes import (
    POINTER,
    Structure,
    c_char,
    c_char_p,
    c_double,
    c_int,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
    cast,
    sizeof,
)
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from jax import Array

from loglinear.jax.inputs import Inputs

NAME = "loglinear_torch"


def _structure(name: str, **fields: Any) -> type[Structure]:
    head = [("struct_size", c_size_t), ("extension", c_void_p)]
    return type(name, (Structure,), {"_fields_": [*head, *fields.items()]})


_Many = _structure("_Many", size=c_int64, types=POINTER(c_int), items=POINTER(c_void_p))
_Named = _structure(
    "_Named", size=c_int64, types=POINTER(c_int), names=POINTER(POINTER(c_void_p)), items=POINTER(c_void_p)
)
_Frame = _structure("_Frame", api=c_void_p, context=c_void_p, stage=c_int, args=_Many, rets=_Many, attrs=_Named)
_Buffer = _structure("_Buffer", dtype=c_int, data=c_void_p, rank=c_int64, dims=POINTER(c_int64))
_Version = _structure("_Version", major=c_int, minor=c_int)
_ErrorOf = _structure("_ErrorOf", message=c_char_p, code=c_int)
_StreamOf = _structure("_StreamOf", context=c_void_p, stream=c_void_p)
_Api = _structure(
    "_Api",
    version=_Version,
    internal=c_void_p,
    error_create=c_void_p,
    error_message=c_void_p,
    error_destroy=c_void_p,
    handler_register=c_void_p,
    stream_get=c_void_p,
)


class _Metadata(Structure):
    _fields_ = (("struct_size", c_size_t), ("version", _Version), ("traits", c_uint32))


class _Extension(Structure):
    """XLA's question to a function that it registers. ``type`` 1: the version of the interface."""

    _fields_ = (("struct_size", c_size_t), ("type", c_int), ("next", c_void_p), ("metadata", POINTER(_Metadata)))


_Call = ctypes.CFUNCTYPE(c_void_p, c_void_p)
INTERNAL = 13  # XLA_FFI_Error_Code
MOST_KEYS, MOST_CHANNELS, MOST_VALUES = 256, 128, 1024  # widths of the kernels, as in loglinear.ops.dispatch
DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
BYTES = {
    10: ("float16", 2),
    11: ("float32", 4),
    12: ("float64", 8),
    16: ("bfloat16", 2),
    4: ("int32", 4),
    5: ("int64", 8),
}


class _Span(Structure):
    _fields_ = (("data", c_void_p), ("length", c_size_t))


class _Scalar(Structure):
    _fields_ = (("dtype", c_int), ("value", POINTER(c_double)))


class _Memory:
    """Memory on a GPU, as ``torch.as_tensor`` reads it."""

    def __init__(self, address: int, shape: tuple[int, ...], size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": f"<i{size}",
            "data": (address, False),
            "version": 3,
        }


@lru_cache(maxsize=4096)
def _on_gpu(address: int, shape: tuple[int, ...], kind: int, stream: int) -> Any:
    """The tensor of memory on the device of a stream. XLA gives out the same addresses again, so that few are made."""
    import torch

    ordinal = c_int(-1)
    status = ctypes.CDLL("libcuda.so.1").cuPointerGetAttribute(ctypes.byref(ordinal), DEVICE_ORDINAL, c_void_p(address))
    if status:
        raise RuntimeError(f"CUDA does not know the memory of an argument: error {status}")
    name, size = BYTES[kind]
    return torch.as_tensor(_Memory(address, shape, size), device=f"cuda:{ordinal.value}").view(getattr(torch, name))


def _tensor(address: int, stream: int | None) -> Any:
    """The PyTorch tensor of a buffer; both share the memory. stream: None on a CPU."""
    import torch

    buffer = _Buffer.from_address(address)
    shape = tuple(buffer.dims[: buffer.rank])
    name, size = BYTES[buffer.dtype]
    dtype, count = getattr(torch, name), math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype, device="cpu" if stream is None else "cuda")
    if stream is not None:
        return _on_gpu(buffer.data, shape, buffer.dtype, stream)
    return torch.frombuffer((c_char * (count * size)).from_address(buffer.data), dtype=dtype).view(shape)


def _attributes(attrs: Any) -> dict[str, Any]:
    """Strings and float64 numbers by name."""

    def text(address: int) -> str:
        span = _Span.from_address(address)
        return ctypes.string_at(span.data, span.length).decode()

    values = {}
    for i in range(attrs.size):
        name = text(cast(attrs.names[i], c_void_p).value or 0)
        item = attrs.items[i]
        values[name] = text(item) if attrs.types[i] == 4 else _Scalar.from_address(item).value[0]
    return values


def _compute(args: list[Any], results: list[Any], names: list[str], scale: float) -> None:
    """The op, of arguments by name, or its derivative where one of them is ``gradient``, that of o.

    Behind the named arguments of the derivative, and behind the results of the op, stand the tensors that are kept.
    """
    import torch

    from loglinear.kernels.tree import launching
    from loglinear.ops.attention import KEPT, attention

    x, kept = dict(zip(names, args)), args[len(names) :]
    gradient = x.get("gradient")
    settings = x.get("cu_seqlens"), None, scale, 0, KEPT if len(results) > 1 and gradient is None else "", "auto"
    given = *(x.get(name) for name in Inputs._fields), *settings
    with torch.no_grad(), launching.into(results):
        found = attention.run(*given) if gradient is None else attention.differentiate(gradient, *given, kept)
    for place, y in zip(results, [y for y in found if y is not None], strict=True):
        if y is not place:
            place.copy_(y)


def _handler(address: int, cuda: bool) -> int | None:
    frame = _Frame.from_address(address)
    if frame.extension:
        extension = _Extension.from_address(frame.extension)
        if extension.type == 1:
            version = _Api.from_address(frame.api).version
            metadata = extension.metadata.contents
            metadata.version.major, metadata.version.minor, metadata.traits = version.major, version.minor, 0
            return None
    api = _Api.from_address(frame.api)
    try:
        stream = None
        if cuda:
            asked = _StreamOf(sizeof(_StreamOf), None, frame.context, None)
            error = _Call(api.stream_get)(ctypes.addressof(asked))
            if error:
                return error
            stream = asked.stream or 0
        attributes = _attributes(frame.attrs)
        args, results = ([_tensor(x.items[i], stream) for i in range(x.size)] for x in (frame.args, frame.rets))
        what = (args, results, attributes["names"].split(), attributes["scale"])
        with nullcontext() if stream is None else _on_stream(stream, args[0].device):
            _compute(*what)
    except Exception as error:  # XLA raises it where the result is asked for
        message = f"{type(error).__name__}: {error}".encode()
        made = _ErrorOf(sizeof(_ErrorOf), None, message, INTERNAL)  # a name keeps the memory until XLA has read it
        return _Call(api.error_create)(ctypes.addressof(made))
    return None


def _on_stream(stream: int, device: Any) -> Any:
    import torch

    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device))


@lru_cache
def _register() -> dict[str, Any]:
    """The functions, which must live as long as the process."""
    handlers = {platform: _Call(partial(_handler, cuda=platform == "CUDA")) for platform in ("cpu", "CUDA")}
    for platform, handler in handlers.items():
        jax.ffi.register_ffi_target(NAME, jax.ffi.pycapsule(handler), platform=platform)
    return handlers


class _Choice:
    """The choice of ``backend="auto"`` on a GPU. asked: whether ``use_torch`` was called. said: the warnings so far."""

    asked = False
    said: ClassVar[set[str]] = set()


def use_torch() -> None:
    """From now on ``backend="auto"`` takes the PyTorch ops, with their Triton kernels, for calls on a GPU that they fit.

    Imports PyTorch. It shares the GPU's memory with JAX: set ``XLA_PYTHON_CLIENT_PREALLOCATE=false`` before JAX starts.
    Such calls have first derivatives alone. ``jit`` over several devices gathers their arguments; in ``shard_map`` they
    stay where they are. Functions that were compiled before stay as they are.

    Raises:
        ModuleNotFoundError: PyTorch or Triton is not installed. RuntimeError: JAX or PyTorch has no NVIDIA GPU here.
    """
    import torch

    import loglinear.kernels.tree.launching  # noqa: F401, needs Triton

    if jax.default_backend() != "gpu" or not torch.cuda.is_available() or torch.version.hip is not None:
        here = f"JAX has {jax.default_backend()!r} and torch.cuda.is_available() is {torch.cuda.is_available()}"
        raise RuntimeError(f"use_torch needs an NVIDIA GPU in JAX and in PyTorch: {here}")
    _Choice.asked = True


def chosen(inputs: Inputs, states: bool) -> bool:
    """Whether ``backend="auto"`` takes the PyTorch op. On a GPU a warning says once what it does not take, and why."""
    if jax.default_backend() != "gpu" or states:
        return False
    if not _Choice.asked:
        return _warn(
            "XLA computes loglinear's ops on this GPU; loglinear.jax.use_torch() takes Triton's kernels, which are faster"
        )
    if inputs.v.dtype == np.float64:
        return _warn(
            "XLA computes loglinear's ops for float64 inputs, where kernels take float32, bfloat16 and float16"
        )
    (K, V), most = (inputs.q.shape[3], inputs.v.shape[3]), MOST_CHANNELS if inputs.per_channel else MOST_KEYS
    if most < K or MOST_VALUES < V:
        return _warn(
            f"XLA computes loglinear's ops for K={K} and V={V}, where kernels take K up to {most} and V up to {MOST_VALUES}"
        )
    return True


def _warn(message: str) -> Literal[False]:
    if message not in _Choice.said:
        _Choice.said.add(message)
        warnings.warn(message, UserWarning, stacklevel=5)
    return False


def _given(inputs: Inputs, offsets: Array | None) -> dict[str, Array]:
    x = {name: y for name, y in zip(Inputs._fields, inputs) if y is not None}
    return x if offsets is None else {**x, "cu_seqlens": offsets}


def _invoke(
    results: list[jax.ShapeDtypeStruct], x: dict[str, Array], kept: Sequence[Array], scale: float
) -> Sequence[Array]:
    _register()
    call = jax.ffi.ffi_call(NAME, results, vmap_method="sequential")
    return call(*x.values(), *kept, names=" ".join(x), scale=np.float64(scale))


def _kept(inputs: Inputs, offsets: Array | None) -> list[jax.ShapeDtypeStruct]:
    """The shapes and dtypes that kernels keep for the derivative; nothing on a CPU."""
    if jax.default_backend() != "gpu":
        return []
    import torch
    from torch._subclasses import FakeTensorMode

    from loglinear.ops.attention import KEPT, attention, mostly_empty

    def fake(x: Array | None) -> Any:
        return None if x is None else torch.empty(x.shape, dtype=getattr(torch, x.dtype.name), device="cuda")

    with FakeTensorMode():
        *given, bounds = map(fake, (*inputs, offsets))
        keep = "" if mostly_empty(bounds, inputs.q.shape[1]) else KEPT
        kept = attention.fake(*given, bounds, None, 1.0, 0, keep, "auto")[1:]
    return [jax.ShapeDtypeStruct(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in kept]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def torch_call(inputs: Inputs, offsets: Array | None, scale: float) -> Array:
    """o of the PyTorch op, ``[B, T, H, V]`` in the dtype of v; offsets: ``cu_seqlens`` or None. It can be differentiated
    once.
    """
    return _invoke([_like(inputs.v)], _given(inputs, offsets), [], scale)[0]


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _forward(inputs: Inputs, offsets: Array | None, scale: float) -> tuple[Array, tuple[Any, ...]]:
    o, *kept = _invoke([_like(inputs.v), *_kept(inputs, offsets)], _given(inputs, offsets), [], scale)
    return o, (inputs, offsets, kept)


def _backward(scale: float, saved: tuple[Any, ...], gradient: Array) -> tuple[Inputs, None]:
    inputs, offsets, kept = saved
    wanted = [_like(x) for x in inputs if x is not None]
    gradients = iter(_invoke(wanted, _given(inputs, offsets) | {"gradient": gradient}, kept, scale))
    return inputs.map(lambda _: next(gradients)), None


torch_call.defvjp(_forward, _backward)
