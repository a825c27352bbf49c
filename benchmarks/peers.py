"""The ops that ours are timed against, each behind one signature. Peers that are not installed are left out.

A peer is built only on request. A failed import is reported as a reason, not raised as an error.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement."""

    B: int
    T: int
    H: int
    G: int
    K: int
    V: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def levels(self) -> int:
        return max(self.T - 1, 0).bit_length() + 1


@dataclass(frozen=True)
class Run:
    """Something to time: ``call()`` gives the output, ``inputs`` are what it is differentiated by."""

    call: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]

    def forward_backward(self) -> Callable[[], tuple[Tensor, ...]]:
        gradient = torch.randn_like(self.call())
        return lambda: torch.autograd.grad(self.call(), self.inputs, gradient)


def inputs(shape: Shape, device: str = "cuda", seed: int = 0) -> dict[str, Tensor]:
    """q, k, v, g, level_scales: normal, gates of a Mamba-2 layer at its initialisation, λ of softplus(1 + noise)."""
    generator = torch.Generator(device).manual_seed(seed)
    B, T, H, G, K, V = shape.B, shape.T, shape.H, shape.G, shape.K, shape.V

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    step = torch.exp(torch.rand(B, T, H, generator=generator, device=device) * 4.6 - 6.9)  # log-uniform [1e-3, 1e-1]
    rate = 1 + 15 * torch.rand(H, generator=generator, device=device)
    return {
        "q": (normal(B, T, G, K) / K**0.5).to(shape.dtype),
        "k": normal(B, T, G, K).to(shape.dtype),
        "v": normal(B, T, H, V).to(shape.dtype),
        "g": -step * rate,
        "level_scales": torch.nn.functional.softplus(1 + 0.1 * normal(B, T, H, shape.levels)).to(shape.dtype),
    }


def differentiable(shape: Shape) -> tuple[Tensor, ...]:
    return tuple(x.requires_grad_() for x in inputs(shape).values())


def delta_inputs(shape: Shape, device: str = "cuda", seed: int = 0) -> dict[str, Tensor]:
    """q, k, v, g, beta, level_scales of a Gated DeltaNet layer: keys of unit length, β in (0, 1)."""
    x = inputs(shape, device, seed)
    k = torch.nn.functional.normalize(x["k"].float(), dim=-1).to(shape.dtype)
    generator = torch.Generator(device).manual_seed(seed + 1)
    beta = torch.rand(*x["g"].shape, generator=generator, device=device)
    return {"q": x["q"], "k": k, "v": x["v"], "g": x["g"], "beta": beta, "level_scales": x["level_scales"]}


def channel_inputs(shape: Shape, device: str = "cuda", seed: int = 0) -> dict[str, Tensor]:
    """``inputs`` with g ``[B, T, H, K]``: the log of a sigmoid over 16, as in a layer of gated linear attention."""
    return inputs(shape, device, seed) | {"g": _channel_gate(shape, device, seed)}


def channel_delta_inputs(shape: Shape, device: str = "cuda", seed: int = 0) -> dict[str, Tensor]:
    """``delta_inputs`` with the gate of ``channel_inputs``."""
    return delta_inputs(shape, device, seed) | {"g": _channel_gate(shape, device, seed)}


def _channel_gate(shape: Shape, device: str, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed + 2)
    x = torch.randn(shape.B, shape.T, shape.H, shape.K, generator=generator, device=device)
    return torch.nn.functional.logsigmoid(x) / 16


def fla_gated_delta(shape: Shape, folder: str | None = None) -> Run:
    """The linear gated delta rule of the installed flash-linear-attention, or of the one unpacked in ``folder``."""
    name = "fla.ops.gated_delta_rule.chunk"
    chunk = importlib.import_module(name) if folder is None else import_from(folder, name)
    q, k, v, g, beta, _ = (x.requires_grad_() for x in delta_inputs(shape).values())
    beta = beta.detach().to(shape.dtype).requires_grad_()
    return Run(lambda: chunk.chunk_gated_delta_rule(q, k, v, g, beta, scale=1.0)[0], (q, k, v, g, beta))


def import_from(folder: str, name: str) -> types.ModuleType:
    """Import a module of a package unpacked in ``folder``, in place of one that is installed under the same name.

    The ``__init__`` files above it are skipped: they import all of the package's models, and transformers with them.
    """
    if not Path(folder, *name.split(".")[:1]).is_dir():
        raise ImportError(f"no {name.split('.')[0]} in {folder}")
    root = name.split(".")[0]
    installed = {key: sys.modules.pop(key) for key in list(sys.modules) if key.split(".")[0] == root}
    try:
        parts = name.split(".")[:-1]
        for depth in range(1, len(parts) + 1):
            package = types.ModuleType(".".join(parts[:depth]))
            package.__path__ = [str(Path(folder, *parts[:depth]))]
            sys.modules[package.__name__] = package
        modules = types.ModuleType(f"{root}.modules")
        modules.__path__ = [str(Path(folder, root, "modules"))]
        sys.modules[modules.__name__] = modules
        return importlib.import_module(name)
    finally:
        for key in [key for key in sys.modules if key.split(".")[0] == root]:
            del sys.modules[key]
        sys.modules.update(installed)


def fla_log_linear(shape: Shape) -> Run:
    from fla.ops.log_linear_attn import chunk_log_linear_attn

    q, k, v, g, scales = differentiable(shape)
    return Run(lambda: chunk_log_linear_attn(q, k, v, g, scales)[0], (q, k, v, g, scales))


def fla_simple_gla(shape: Shape) -> Run:
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v, g, _ = differentiable(shape)
    repeat = shape.H // shape.G
    q, k = (x.detach().repeat_interleave(repeat, 2).requires_grad_() for x in (q, k))
    return Run(lambda: chunk_simple_gla(q, k, v, g)[0], (q, k, v, g))


def mamba2_ssd(shape: Shape, chunk: int) -> Run:
    """Mamba-2's SSD: dt = 1 would fix the decay, so dt is the step and x is divided by nothing: the same work."""
    load_mamba_without_extensions()
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    q, k, v, g, _ = differentiable(shape)
    rate = -torch.ones(shape.H, device=v.device)
    step = (-g).detach().requires_grad_()
    return Run(lambda: mamba_chunk_scan_combined(v, step, rate, k, q, chunk), (q, k, v, step))


def mamba2_step(shape: Shape) -> Callable[[], Tensor]:
    """One token of Mamba-2's linear recurrence, its state in the dtype of the inputs, as its own cache keeps it.

    Strides of 0 say that a head's rows share A, dt and the bias of dt, as in Mamba-2: the kernel then reads one number a head.
    """
    load_mamba_without_extensions()
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    B, H, K, V = shape.B, shape.H, shape.K, shape.V
    x = inputs(shape)
    state = torch.randn(B, H, V, K, dtype=shape.dtype, device="cuda")
    step = (-x["g"][:, 0]).unsqueeze(-1).expand(B, H, V)
    rate = torch.full((H,), -1.0, device="cuda")[:, None, None].expand(H, V, K)
    zero = torch.zeros(H, device="cuda")[:, None].expand(H, V)  # it may do without D and a bias of dt, but fails then
    tokens = (x["v"][:, 0], step, rate, x["k"][:, 0], x["q"][:, 0])
    return lambda: selective_state_update(state, *tokens, D=zero, dt_bias=zero)


def fla_log_linear_step(shape: Shape, context: int) -> Callable[[], Tensor]:
    """One token of flash-linear-attention's log-linear op, from the state after ``context - 2`` tokens of one row."""
    import dataclasses

    from fla.ops.log_linear_attn import chunk_log_linear_attn

    if context > 1 << 17:
        raise ValueError("flash-linear-attention's log-linear op takes fewer than 2^17 tokens")

    def once(x: dict[str, Tensor], **state):
        return chunk_log_linear_attn(*x.values(), output_final_state=True, **state)

    with torch.no_grad():
        _, one = once(inputs(dataclasses.replace(shape, B=1, T=context - 2)))
        rows = {name: x.expand(shape.B, *x.shape[1:]).contiguous() for name, x in vars(one).items() if x.shape[0] == 1}
        state = dataclasses.replace(one, **rows)
        x = inputs(shape)
        x["level_scales"] = torch.rand(shape.B, 1, shape.H, (context - 1).bit_length() + 1, device="cuda").to(
            shape.dtype
        )

    def call() -> Tensor:
        with torch.no_grad():
            return once(x, initial_state=state)[0]

    return call


def load_mamba_without_extensions() -> None:
    """Let ``mamba_ssm.ops`` be imported without ``mamba_ssm/__init__.py``, which needs compiled extensions."""
    if "mamba_ssm" in sys.modules:
        return
    spec = importlib.machinery.PathFinder.find_spec("mamba_ssm")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("mamba_ssm is not installed")
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["mamba_ssm"] = package


def softmax_attention(shape: Shape, heads: int, width: int, backend: SDPBackend) -> Run:
    """Causal softmax attention of ``heads`` heads of ``width``."""
    q, k, v = (
        torch.randn(shape.B, heads, shape.T, width, dtype=shape.dtype, device="cuda", requires_grad=True)
        for _ in range(3)
    )

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return Run(call, (q, k, v))


def fla_gla(shape: Shape) -> Run:
    from fla.ops.gla import chunk_gla

    q, k, v, g, _ = (x.requires_grad_() for x in channel_inputs(shape).values())
    return Run(lambda: chunk_gla(q, k, v, g, scale=1.0)[0], (q, k, v, g))


def fla_kda(shape: Shape) -> Run:
    from fla.ops.kda import chunk_kda

    q, k, v, g, beta, _ = (x.requires_grad_() for x in channel_delta_inputs(shape).values())
    beta = beta.detach().to(shape.dtype).requires_grad_()
    return Run(lambda: chunk_kda(q, k, v, g, beta, scale=1.0)[0], (q, k, v, g, beta))


# Other libraries' ops of each transition, by their names in rows.
GATED: dict[str, Callable[[Shape], Run]] = {
    "fla log_linear_attn": fla_log_linear,
    "fla simple_gla": fla_simple_gla,
    **{f"mamba2 ssd chunk {chunk}": partial(mamba2_ssd, chunk=chunk) for chunk in (64, 128, 256)},
}
OLD = "fla 0.2.2 gated_delta_rule"  # whose backward runs on Hopper
DELTA: dict[str, Callable[[Shape], Run]] = {"fla gated_delta_rule": fla_gated_delta, OLD: fla_gated_delta}
CHANNEL_GATED: dict[str, Callable[[Shape], Run]] = {"fla gla": fla_gla}
CHANNEL_DELTA: dict[str, Callable[[Shape], Run]] = {"fla kda": fla_kda}


def softmax_peers(heads: int, width: int) -> dict[str, Callable[[Shape], Run]]:
    """Softmax attention at ``heads`` heads of ``width``, by name."""
    backends = {"flash attention 2": SDPBackend.FLASH_ATTENTION, "cudnn attention": SDPBackend.CUDNN_ATTENTION}
    return {
        f"{name}, {heads}x{width}": partial(softmax_attention, heads=heads, width=width, backend=backend)
        for name, backend in backends.items()
    }
