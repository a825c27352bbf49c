"""ShortConvolution: a causal depthwise convolution over the last few tokens of each sequence.

Whole batches, packed sequences and continued sequences are one computation. Every sequence is extended on the left by its
*tail*, the inputs just before it (zeros at its start). The last inputs of the extended sequence are its next tail. On CUDA
one kernel does a call that starts at the beginning of its sequences (``ops/convolution.py``).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loglinear.layers.activations import ACTIVATIONS, check_activation
from loglinear.layers.initialization import StatedInit
from loglinear.layers.packing import check_packed, locate_tokens
from loglinear.ops import convolution, dispatch


class ShortConvolution(StatedInit):
    """``y_t = silu(bias + Σ_i weight[:, i] · x_{t-W+1+i})`` per channel, with W taps; nothing crosses a sequence's start.

    Args:
        channels: width of input and output. width: W, taps; a state keeps W - 1 inputs. 0 leaves the activation alone.
        bias: whether to add one.
        activation: in place of SiLU, one of ``activations.ACTIVATIONS``; the kernels know SiLU alone.
    """

    weight: nn.Parameter  # the weight is None if the width is 0

    def __init__(self, channels: int, width: int = 4, bias: bool = True, activation: str = "silu") -> None:
        super().__init__()
        if width < 0:
            raise ValueError(f"width must be at least 0: got {width}")
        self.channels, self.width = channels, width
        self.activation = check_activation(activation, "activation")
        self.weight = nn.Parameter(torch.empty(channels, width)) if width else None  # type: ignore[assignment]
        self.bias = nn.Parameter(torch.empty(channels)) if bias and width else None
        self.reset_parameters()

    @property
    def taps(self) -> Tensor:
        """The weight as ``[channels, W]``."""
        return self.weight

    @property
    def keep(self) -> int:
        """Inputs in a tail."""
        return max(self.width - 1, 0)

    def unfused(self) -> str | None:
        """The field that kernels do not know; None if they know all."""
        if self.width == 0:
            return "no taps"
        return None if self.activation == "silu" else f"the activation {self.activation}"

    def initial_values(self) -> dict[str, Tensor]:
        """Uniform in ±1/sqrt(W) as torch's Conv1d (fan-in W: depthwise), and a bias of zero."""
        if self.weight is None:
            return {}
        bound = 1 / math.sqrt(self.width)
        values = {"weight": torch.empty_like(self.weight).uniform_(-bound, bound)}
        if self.bias is not None:
            values["bias"] = torch.zeros_like(self.bias)
        return values

    def forward(
        self,
        x: Tensor,
        tail: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        in_place: bool = False,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Convolve, and return the inputs that the next call needs.

        Args:
            x: ``[B, T, channels]``; with ``cu_seqlens`` B is 1 and sequences are packed along T. T may be 0.
            tail: ``[n, W - 1, channels]``, the tail from an earlier call, one row per sequence; None at the start.
            cu_seqlens: integer ``[n + 1]``, offsets of the packed sequences.
            in_place: whether ``tail`` itself becomes the new tail (decoding).
            rows: int64 ``[n]``, the row of ``tail`` for each sequence; None: they are the same.

        Returns:
            y ``[B, T, channels]`` and the new tail ``[n, W - 1, channels]``, in the dtype of x unless in place.
        """
        if cu_seqlens is not None:
            check_packed(x, "x", cu_seqlens)
        keep = self.keep
        count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if tail is None and not in_place and self._has_kernel(x):
            place = None if cu_seqlens is None else locate_tokens(cu_seqlens, x.shape[1])[1].int()
            return convolution.convolve(x, self.taps, self.bias, place), self._last_inputs(x, cu_seqlens)
        if tail is None:
            tail = x.new_zeros(count, keep, self.channels)
        elif tail.shape != (len(tail) if rows is not None else count, keep, self.channels):
            raise ValueError(f"tail must have shape {[count, keep, self.channels]}: got {list(tail.shape)}")
        buffer, tail = tail, (tail if rows is None else tail.index_select(0, rows)).to(x.dtype)
        if cu_seqlens is None:
            extended, length = torch.cat([tail, x], dim=1), x.shape[1]
            y = self._taps([extended[:, i : i + length] for i in range(keep + 1)])
            new_tail = extended[:, length:]
        else:
            y, new_tail = self._packed(x, tail, cu_seqlens)
        if in_place:
            return y, buffer.copy_(new_tail) if rows is None else buffer.index_copy_(0, rows, new_tail.to(buffer.dtype))
        return y, new_tail.clone() if cu_seqlens is None else new_tail  # a view would keep the input alive in a cache

    def _has_kernel(self, x: Tensor) -> bool:
        if self.weight is None or not convolution.has_kernel(x, self.taps):
            return False
        field = self.unfused()
        return field is None or dispatch.plain("the short convolution", field)

    def _packed(self, x: Tensor, tail: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """The packed inputs with every tail before its sequence: token t of sequence s stands at ``t + (s + 1)(W - 1)``."""
        length, (rows, keep, _) = x.shape[1], tail.shape
        offset = cu_seqlens.long()
        row = torch.arange(rows, device=x.device)
        sequence, _ = locate_tokens(cu_seqlens, length)
        place = torch.arange(length, device=x.device) + (sequence + 1) * keep
        steps = torch.arange(keep, device=x.device)
        tail_place = (offset[:-1] + row * keep)[:, None] + steps  # [n, W-1]
        extended = x.new_zeros(length + rows * keep, self.channels)
        extended = extended.index_put((tail_place,), tail).index_put((place,), x[0])
        y = self._taps([extended[place - keep + i] for i in range(keep + 1)])
        new_tail = extended[(offset[1:] + row * keep)[:, None] + steps]  # the last W - 1 of each extended sequence
        return y.unsqueeze(0), new_tail

    def _last_inputs(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The tail after x ``[B, T, channels]`` that had none before it: zeros stand where a sequence is too short."""
        keep = self.keep
        if cu_seqlens is None:
            last = x[:, max(0, x.shape[1] - keep) :]
            return F.pad(last, (0, 0, keep - last.shape[1], 0))  # a copy: a view would keep x alive in a cache
        offset, steps = cu_seqlens.long(), torch.arange(-keep, 0, device=x.device)
        place = offset[1:, None] + steps  # [n, W-1], negative where the first sequence is short
        padded = F.pad(x[0], (0, 0, keep, 0))
        return padded[place + keep].masked_fill((place < offset[:-1, None]).unsqueeze(-1), 0)

    def _taps(self, shifted: list[Tensor]) -> Tensor:
        """Weighted sum of the W shifted inputs, then the activation. A sum of shifts works for T = 0 and fuses."""
        if self.weight is None:
            return ACTIVATIONS[self.activation](shifted[0])
        weight = self.taps.to(shifted[0].dtype)
        y = shifted[0] * weight[:, 0]
        for i in range(1, self.width):
            y = torch.addcmul(y, shifted[i], weight[:, i])
        return ACTIVATIONS[self.activation](y if self.bias is None else y + self.bias.to(y.dtype))

    def extra_repr(self) -> str:
        return f"{self.channels}, width={self.width}, bias={self.bias is not None}, activation={self.activation!r}"
