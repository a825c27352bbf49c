"""Mixers that differ from ours in the op alone: Mamba-2's own SSD kernels, flash-linear-attention's gated delta rule.

The kernels of other libraries are operators here, like ours, so they add neither a break nor a copy to a compiled block.
Projections, convolution and norms are inherited. Each op takes the work that it can do itself: SSD the softplus of the time
step, ``x · dt`` and the skip, the gated delta rule the norms of queries and keys.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from loglinear.layers import LogLinearGatedDeltaNet, LogLinearMamba2
from loglinear.layers.initialization import wide
from peers import import_from, load_mamba_without_extensions

SSD_CHUNK = 128  # the fastest of 64, 128 and 256 at T=16,384 (benchmarks/results/scalar_gate.jsonl)
FLA_CHUNK = 64


def _like(x: Tensor, example: Tensor) -> Tensor:
    """x as the operator has promised it: contiguous and in the dtype of the input that it is the gradient of."""
    return x.to(example.dtype).contiguous()


@lru_cache(maxsize=1)
def _ssd_module() -> ModuleType:
    load_mamba_without_extensions()
    from mamba_ssm.ops.triton import ssd_combined

    return ssd_combined


@torch.library.custom_op("benchmarks::ssd", mutates_args=())
def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """y ``[B, T, H, V]`` of Mamba-2's scan: x alike, raw dt ``[B, T, H]``, B and C ``[B, T, G, K]``, the others ``[H]``."""
    forward = _ssd_module()._mamba_chunk_scan_combined_fwd
    return forward(x, dt, A, B, C, SSD_CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True)[0].contiguous()


@ssd.register_fake
def _(x, dt, A, B, C, D, dt_bias):
    return x.new_empty(x.shape)


@torch.library.custom_op("benchmarks::ssd_backward", mutates_args=())
def ssd_backward(
    dy: Tensor, y: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> list[Tensor]:
    """Gradients of the seven inputs of ``ssd``."""
    backward = _ssd_module()._mamba_chunk_scan_combined_bwd
    dx, ddt, dA, dB, dC, dD, _, dbias, _ = backward(
        dy, x, dt, A, B, C, y, SSD_CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True
    )
    inputs = (x, dt, A, B, C, D, dt_bias)
    return [_like(got, given) for got, given in zip((dx, ddt, dA, dB, dC, dD, dbias), inputs, strict=True)]


@ssd_backward.register_fake
def _(dy, y, *inputs):
    return [x.new_empty(x.shape) for x in inputs]


ssd.register_autograd(
    lambda ctx, dy: tuple(ssd_backward(dy.contiguous(), *ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output, *inputs),
)


class SSDMamba2(LogLinearMamba2):
    """The linear Mamba-2 mixer on Mamba-2's own kernels."""

    def forward(self, hidden: Tensor, **unused) -> tuple[Tensor, None]:
        """As in ``LogLinearMamba2``, for whole rows without a state."""
        z, xBC, dt = self.in_proj(hidden).split(self.in_widths, dim=-1)
        x, B, C = self.conv(xBC)[0].split(self.conv_widths, dim=-1)
        B, C = (keys.unflatten(-1, (self.num_groups, -1)) for keys in (B, C))
        x = x.unflatten(-1, (self.num_heads, -1))
        y = ssd(x, dt, -torch.exp(wide(self.A_log)), B, C, self.D, self.dt_bias)
        return self.out_proj(self.norm(y.flatten(-2), z)), None


_folders: list[str] = []  # where flash-linear-attention was unpacked: an operator's arguments are tensors


def use_fla(folder: str) -> None:
    """Take the gated delta rule of the flash-linear-attention unpacked in ``folder`` (0.2.2: its backward runs on Hopper)."""
    _folders[:] = [folder]
    _fla_module.cache_clear()


@lru_cache(maxsize=1)
def _fla_module() -> ModuleType:
    if not _folders:
        raise ImportError(
            "flash-linear-attention 0.2.2 is not given: unpack its wheel and name the folder with --old-fla"
        )
    return import_from(_folders[0], "fla.ops.gated_delta_rule.chunk")


@torch.library.custom_op("benchmarks::gated_delta", mutates_args=())
def gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> list[Tensor]:
    """o ``[B, T, H, V]`` and what its backward keeps: q and k ``[B, T, H, K]``, v ``[B, T, H, V]``, g, beta ``[B, T, H]``."""
    fla = _fla_module()
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
    sums, o, Aw, Au, _ = fla.chunk_gated_delta_rule_fwd(
        fla.l2norm_fwd(q), fla.l2norm_fwd(k), v, g, beta, 1.0, initial_state=None, output_final_state=False
    )
    return [o.to(v.dtype), sums, Aw, Au]


@gated_delta.register_fake
def _(q, k, v, g, beta):
    inverse = k.new_empty((*g.shape, FLA_CHUNK))
    return [v.new_empty(v.shape), g.new_empty(g.shape, dtype=torch.float32), inverse, torch.empty_like(inverse)]


@torch.library.custom_op("benchmarks::gated_delta_backward", mutates_args=())
def gated_delta_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, sums: Tensor, Aw: Tensor, Au: Tensor
) -> list[Tensor]:
    """Gradients of the five inputs of ``gated_delta``."""
    fla = _fla_module()
    given, (q, k, v, beta) = (q, k, v, g, beta), (x.contiguous() for x in (q, k, v, beta))
    dq, dk, dv, dbeta, dg, _ = fla.chunk_gated_delta_rule_bwd(
        fla.l2norm_fwd(q), fla.l2norm_fwd(k), v, sums, beta, Aw, Au, 1.0, None, do.contiguous(), None
    )
    grads = (fla.l2norm_bwd(q, dq), fla.l2norm_bwd(k, dk), dv, dg, dbeta)
    return [_like(got, x) for got, x in zip(grads, given, strict=True)]


@gated_delta_backward.register_fake
def _(do, q, k, v, g, beta, sums, Aw, Au):
    return [x.new_empty(x.shape) for x in (q, k, v, g, beta)]


gated_delta.register_autograd(
    lambda ctx, grads: tuple(gated_delta_backward(grads[0], *ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output[1:]),
)


class FlaGatedDeltaNet(LogLinearGatedDeltaNet):
    """The linear Gated DeltaNet mixer on the kernels of flash-linear-attention."""

    def forward(self, hidden: Tensor, **unused) -> tuple[Tensor, None]:
        """As in ``LogLinearGatedDeltaNet``, for whole rows without a state."""
        qkv, gate, a, b = self.in_proj(hidden).split(self.in_widths, dim=-1)
        q, k, v = self.conv(qkv)[0].split(self.conv_widths, dim=-1)
        q, k = (keys.unflatten(-1, (self.num_key_heads, -1)) for keys in (q, k))
        v = v.unflatten(-1, (self.num_heads, -1))
        g = -torch.exp(wide(self.A_log)) * torch.nn.functional.softplus(wide(a) + wide(self.dt_bias))
        o = gated_delta(q, k, v, g, torch.sigmoid(wide(b)).to(v.dtype))[0]
        return self.out_proj(self.norm(o, gate.unflatten(-1, (self.num_heads, -1))).flatten(-2)), None
