"""DISPATCH: which implementation takes a call, and why not the other.

Kernels take what they can. Plain PyTorch takes everything, and on a GPU is many times slower: each reason for it is then said
once. ``backend="triton"`` makes the reason an error, ``backend="torch"`` asks for plain PyTorch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from loglinear import kernels
from loglinear.kernels.devices import why_unfit
from loglinear.ops import checks
from loglinear.ops.inputs import Backend, Call, Inputs, State
from loglinear.state import CHUNK_SIZE, LinearState
from loglinear.transition import SCALAR_GATE

BACKENDS = get_args(Backend)
MAX_KEY_WIDTH, MAX_VALUE_WIDTH = 256, 1024  # of the kernels
MAX_CHANNELS = 128  # of the kernels of a gate per channel: their queries and keys are as wide as their gates
STEP_CHUNKS = (16, 32, 64)  # chunks of a state that the step kernels compile for; with longer ones they spill

said: set[str] = set()


def check_backend(backend: Backend) -> None:
    """Raise a ValueError for an unknown one."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}: got {backend!r}")


def attention(inputs: Inputs, backend: Backend = "auto") -> bool:
    """Whether the kernels take a call of an op: CUDA, at most 32 bits, K up to 256, V up to 1,024, enough shared memory."""
    return _takes(inputs.transition().op, inputs.v, lambda: _why_not(inputs), backend)


def takes(call: Call) -> bool:
    """``attention``, whose yes is kept with the kind of call: to ask costs more than a short kernel."""
    if call.taken is None:
        return attention(call.inputs, call.backend)
    if call.backend not in call.taken and attention(call.inputs, call.backend):
        call.taken.add(call.backend)
    return call.backend in call.taken


def from_state(inputs: Inputs, state: State | None, backend: Backend = "auto") -> bool:
    """Whether the kernels take a call that goes on from ``state``: from some number of tokens on, where they may choose."""
    few = inputs.q.shape[0] * inputs.q.shape[1] <= CHUNK_SIZE
    if (few and backend != "triton") or not attention(inputs, backend):
        return False
    size = CHUNK_SIZE if state is None or isinstance(state, LinearState) else state.chunk_size
    reason = f"a state of chunks of {size} tokens, where kernels go on from chunks of {CHUNK_SIZE}"
    return size == CHUNK_SIZE or _refuse("a call with an initial_state", reason, backend)


def step(q: Tensor, v: Tensor, chunk_size: int = CHUNK_SIZE, backend: Backend = "auto") -> bool:
    """Whether the step kernels take these: CUDA, at most 32 bits, K up to 256, V up to 1,024, chunks of 16 to 64 tokens."""

    def why_not() -> str | None:
        if chunk_size not in STEP_CHUNKS:
            return f"a state of chunks of {chunk_size} tokens, where kernels take {STEP_CHUNKS}"
        return why_unfit(q.device, SCALAR_GATE, int(q.shape[3]))  # no step needs more

    return _takes("a decoding step", v, lambda: wide_heads(q, v) or why_not(), backend)


def _why_not(inputs: Inputs) -> str | None:
    q, v, transition = inputs.q, inputs.v, inputs.transition()
    if transition.per_channel and q.shape[3] > MAX_CHANNELS:
        return f"a gate per key channel and K={int(q.shape[3])}, where kernels take K up to {MAX_CHANNELS}"
    return wide_heads(q, v) or why_unfit(q.device, transition, int(q.shape[3]))


def wide_heads(q: Tensor, v: Tensor) -> str | None:
    """Why heads ``[B, T, heads, width]`` do not fit into the kernels' tiles; None where they do."""
    key_width, value_width = q.shape[3], v.shape[3]
    if key_width <= MAX_KEY_WIDTH and value_width <= MAX_VALUE_WIDTH:
        return None
    limits = f"kernels take K up to {MAX_KEY_WIDTH} and V up to {MAX_VALUE_WIDTH:,}"
    return f"heads of K={int(key_width)} and V={int(value_width)}, where {limits}"


def on_kernels(what: str, x: Tensor) -> bool:
    """Whether kernels take tensors like x at all: on CUDA, at most 32 bits, with Triton installed."""
    return _takes(what, x, lambda: None, "auto")


def _takes(what: str, x: Tensor, why_not: Callable[[], str | None], backend: Backend) -> bool:
    if backend == "torch" or (backend == "auto" and not x.is_cuda):
        return False
    if not x.is_cuda:
        reason: str | None = f"tensors on {x.device.type}, where kernels need CUDA"
    elif x.dtype == torch.float64:
        reason = "float64 inputs, where kernels take float32, bfloat16 and float16"
    elif not kernels.installed():
        reason = "Triton is not installed (pip install triton)"
    else:
        reason = why_not()
    return reason is None or _refuse(what, reason, backend)


def _refuse(what: str, reason: str, backend: Backend) -> Literal[False]:
    if backend == "triton":
        raise ValueError(f"backend must not be 'triton' for {what} here: {reason}")
    return plain(what, reason)


def plain(what: str, reason: str) -> Literal[False]:
    """False, the answer of all that no kernel takes. Warns the first time that ``what`` has none for this reason."""
    if not torch.compiler.is_compiling():
        warn_once(f"{what} runs in plain PyTorch on the GPU, not in a kernel: {reason}")
    return False


def warn_once(message: str, once: str | None = None) -> None:
    """A UserWarning, once in a process for each ``once`` (None: each message)."""
    key = message if once is None else once
    if key not in said:
        said.add(key)
        warnings.warn(message, UserWarning, stacklevel=5)


def warn_of_heads_first(op: str, q: Tensor, state: State | None) -> None:
    """Fewer tokens than heads are more often ``[B, H, T, K]`` than a short text. A state's shapes would not have fitted."""
    if not isinstance(q, Tensor) or q.dim() != 4 or state is not None or not checks.values_are_known(q):
        return
    if 0 < q.shape[1] < q.shape[2]:
        warn_once(
            f"q of {op} has shape {list(q.shape)}, fewer tokens (T={q.shape[1]}) than heads (G={q.shape[2]}): "
            "all inputs must be [B, T, heads, ...], time before heads",
            once=f"heads first: {op}",
        )
