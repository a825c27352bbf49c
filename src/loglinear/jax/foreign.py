"""FOREIGN: the PyTorch ops, and on a GPU their Triton kernels, as a call inside of a JAX program.

XLA's typed foreign function interface (FFI) hands a function the addresses of its buffers, and on a GPU its stream. The
function here makes PyTorch tensors of the addresses, without copies, runs the op on that stream and copies the results
into XLA's buffers. The derivative is a second such call: it runs the op again, forward and backward. PyTorch's
allocator and XLA's share the device: ``XLA_PYTHON_CLIENT_PREALLOCATE=false`` leaves memory to PyTorch.

The structures are those of ``xla/ffi/api/c_api.h`` (version 0.3 and 0.4), of which the fields that follow are not read.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import POINTER, Structure, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p, cast, sizeof
from functools import lru_cache, partial
from typing import Any

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
BYTES = {
    10: ("float16", 2),
    11: ("float32", 4),
    12: ("float64", 8),
    16: ("bfloat16", 2),
    4: ("int32", 4),
    5: ("int64", 8),
}


def _tensor(address: int, cuda: bool) -> Any:
    """The PyTorch tensor of a buffer; both share the memory."""
    import torch

    buffer = _Buffer.from_address(address)
    shape = tuple(buffer.dims[i] for i in range(buffer.rank))
    name, size = BYTES[buffer.dtype]
    dtype, count = getattr(torch, name), math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype, device="cuda" if cuda else "cpu")
    if not cuda:
        return torch.frombuffer((ctypes.c_char * (count * size)).from_address(buffer.data), dtype=dtype).view(shape)
    interface = {"shape": shape, "typestr": f"<i{size}", "data": (buffer.data, False), "version": 3}
    plain = type("Memory", (), {"__cuda_array_interface__": interface})()
    return torch.as_tensor(plain, device="cuda").view(dtype)


def _attributes(attrs: Any) -> dict[str, Any]:
    """Strings and float64 numbers by name."""

    class Span(Structure):
        _fields_ = (("data", c_void_p), ("length", c_size_t))

    class Scalar(Structure):
        _fields_ = (("dtype", c_int), ("value", POINTER(ctypes.c_double)))

    def text(address: int) -> str:
        span = Span.from_address(address)
        return ctypes.string_at(span.data, span.length).decode()

    values = {}
    for i in range(attrs.size):
        name = text(cast(attrs.names[i], c_void_p).value or 0)
        item = attrs.items[i]
        values[name] = text(item) if attrs.types[i] == 4 else Scalar.from_address(item).value[0]
    return values


def _compute(args: list[Any], results: list[Any], names: list[str], scale: float) -> None:
    """Forward: the arguments by name; results: o. Backward: the gradient of o behind them; results: their gradients."""
    import torch

    from loglinear.ops import log_linear_attention, log_linear_delta_rule

    x = dict(zip(names, args))
    offsets = x.pop("cu_seqlens", None)
    op = log_linear_delta_rule if "beta" in x else log_linear_attention
    call = partial(op, scale=scale, cu_seqlens=offsets)
    if len(args) == len(names):
        with torch.no_grad():
            results[0].copy_(call(**{"g": None, "level_scales": None, **x})[0])
        return
    with torch.enable_grad():
        x = {name: y.detach().requires_grad_() for name, y in x.items()}
        o, _ = call(**{"g": None, "level_scales": None, **x})
        for result, gradient in zip(results, torch.autograd.grad(o, list(x.values()), args[-1])):
            result.copy_(gradient)


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
        args, results = ([_tensor(x.items[i], cuda) for i in range(x.size)] for x in (frame.args, frame.rets))
        attributes = _attributes(frame.attrs)
        what = (args, results, attributes["names"].split(), attributes["scale"])
        if not cuda:
            _compute(*what)
            return None
        import torch

        asked = _StreamOf(sizeof(_StreamOf), None, frame.context, None)
        error = _Call(api.stream_get)(ctypes.addressof(asked))
        if error:
            return error
        with torch.cuda.stream(torch.cuda.ExternalStream(asked.stream or 0)):
            _compute(*what)
    except Exception as error:  # XLA raises it where the result is asked for
        message = f"{type(error).__name__}: {error}".encode()
        return _Call(api.error_create)(ctypes.addressof(_ErrorOf(sizeof(_ErrorOf), None, message, INTERNAL)))
    return None


@lru_cache
def _register() -> dict[str, Any]:
    """The functions, which must live as long as the process."""
    handlers = {platform: _Call(partial(_handler, cuda=platform == "CUDA")) for platform in ("cpu", "CUDA")}
    for platform, handler in handlers.items():
        jax.ffi.register_ffi_target(NAME, jax.ffi.pycapsule(handler), platform=platform)
    return handlers


def _given(inputs: Inputs, offsets: Array | None) -> dict[str, Array]:
    x = {name: y for name, y in zip(Inputs._fields, inputs) if y is not None}
    return x if offsets is None else {**x, "cu_seqlens": offsets}


def _invoke(results: Any, x: dict[str, Array], more: list[Array], scale: float) -> Any:
    _register()
    call = jax.ffi.ffi_call(NAME, results, vmap_method="sequential")
    return call(*x.values(), *more, names=" ".join(x), scale=np.float64(scale))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def torch_call(inputs: Inputs, offsets: Array | None, scale: float) -> Array:
    """o of the PyTorch op, ``[B, T, H, V]`` in the dtype of v; offsets: ``cu_seqlens`` or None. It can be differentiated
    once.
    """
    v = inputs.v
    return _invoke(jax.ShapeDtypeStruct(v.shape, v.dtype), _given(inputs, offsets), [], scale)


def _forward(inputs: Inputs, offsets: Array | None, scale: float) -> tuple[Array, tuple[Inputs, Array | None]]:
    return torch_call(inputs, offsets, scale), (inputs, offsets)


def _backward(scale: float, kept: tuple[Inputs, Array | None], gradient: Array) -> tuple[Inputs, None]:
    inputs, offsets = kept
    wanted = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs if x is not None]
    gradients = iter(_invoke(wanted, _given(inputs, offsets), [gradient], scale))
    return inputs.map(lambda _: next(gradients)), None


torch_call.defvjp(_forward, _backward)
