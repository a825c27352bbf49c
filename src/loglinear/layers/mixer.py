"""RecurrentMixer: the call that every linear and log-linear mixer shares. A kind of mixer adds its projections and its gates.

    streams = project(hidden)              # convolved channels, output gate, raw rates
    q, k, v, g, beta = inputs(streams)     # behind the convolution
    o = the sequence mixing
    out = outputs(o)                       # norm, gate, output projection

States, packing, steps in place and context groups are handled here and nowhere else.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from loglinear.layers import step
from loglinear.layers.conv import ShortConvolution
from loglinear.layers.initialization import StatedInit
from loglinear.layers.level_scale import LevelScale
from loglinear.layers.linear import Normed, project, projections
from loglinear.layers.norm import OutputGate, RMSNorm
from loglinear.layers.recurrence import convolve, mix, positions
from loglinear.layers.state import RecurrentMixerState
from loglinear.ops.fused import Columns

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


class Streams(NamedTuple):
    """The projections of a mixer's input, and λ's.

    Attributes:
        conv: ``[B, T, channels]``, to be convolved. gate: ``[B, T, H·V]``, of the output; no columns without a gate.
        rate: ``[B, T, H]``, the raw time step or decay rate, or one for each key channel, ``[B, T, H·K]``; no columns without
            a decay. strength: ``[B, T, H]``, raw β; no columns where it is 1, None without the delta rule.
        dl: ``[B, T, H·L]``, λ's projection; None in a linear model, and where ``LevelScale`` is to make it.
        joined: ``[B, T, columns]``, of which the first four are columns in the order of the mixer's own projection, but for
            those that are projected once more. A mixer may have no such tensor, but the step kernels need one.
        position: int64 ``[B, T]``, tokens before each one; None unless the mixer ``reads_positions``.
    """

    conv: Tensor
    gate: Tensor
    rate: Tensor
    strength: Tensor | None = None
    dl: Tensor | None = None
    joined: Tensor | None = None
    position: Tensor | None = None


class RecurrentMixer(StatedInit):
    """Base of the mixers whose memory is a state. Called as ``loglinear.layers`` says."""

    num_heads: int
    in_proj: nn.Module
    conv: ShortConvolution
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    level_scale: LevelScale | None
    norm: RMSNorm | OutputGate
    out_proj: nn.Module
    context_group: ProcessGroup | None = None  # set_context_group
    unit_length: bool = False  # whether the sequence mixing divides q and k by their lengths
    reads_positions: bool = False  # whether ``inputs`` needs ``streams.position``

    @abstractmethod
    def project(self, hidden: Tensor) -> Streams:
        """The streams of hidden ``[B, T, hidden_size]``."""

    @abstractmethod
    def inputs(self, mixed: Tensor, streams: Streams) -> tuple[dict[str, Tensor], Tensor | None]:
        """The arguments of the sequence mixing, and the skip that ``outputs`` adds to its result.

        Args:
            mixed: ``[B, T, channels]``, ``streams.conv`` behind the convolution.

        Returns:
            q, k ``[B, T, G, K]``, v ``[B, T, H, V]``, g ``[B, T, H]`` or ``[B, T, H, K]`` and, for the delta rule, beta
            ``[B, T, H]``; and the skip ``[B, T, H, V]`` or None.
        """

    @abstractmethod
    def outputs(self, o: Tensor, gate: Tensor, skip: Tensor | None) -> Tensor:
        """``[B, T, hidden_size]`` of o ``[B, T, H, V]``: norm, output gate and projection."""

    def fused_step(self, streams: Streams, state: RecurrentMixerState) -> Tensor:
        """The output projection's input ``[B, T, H·V]``, by the kernels of a step; ``state`` takes the tokens in.

        Here g and beta come from ``inputs``, one more launch. A mixer without kernels gives a reason in ``unfused``.
        """
        mixed, _, gates = step.convolve_and_gate(self, streams, state, Columns(conv=0))
        inputs, skip = self.inputs(mixed, streams)
        assert skip is None, "a mixer with a skip has a fused_step of its own"
        q, k, v, gates["g"], gates["beta"] = (inputs.get(name) for name in ("q", "k", "v", "g", "beta"))
        return step.gate_and_norm(self, step.recur(q, k, v, gates, state), streams.gate, state)  # type: ignore[arg-type]

    def whole(self, hidden: Tensor, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None) -> Tensor | None:
        """The output projection's input, of sequences from their start, by one operator; None where the lines below run."""
        return None

    def token_step(self, streams: Streams, state: RecurrentMixerState) -> Tensor | Normed:
        """``fused_step``, or what its norm is yet to be made of; the product with the norm then moves the positions on."""
        return self.fused_step(streams, state)

    def unfused(self) -> str | None:
        """The field that the kernels of a step do not know; None if they know all."""
        return self.conv.unfused() or self.norm.unfused()

    def forward(
        self,
        hidden: Tensor,
        state: RecurrentMixerState | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> tuple[Tensor, RecurrentMixerState | None]:
        """Mix along T. Arguments and results are those of every mixer: see ``loglinear.layers``."""
        if state is None and not output_state and self.context_group is None:
            inner = self.whole(hidden, cu_seqlens, cu_seqlens_cpu)
            if inner is not None:
                return self.out_proj(inner), None
        streams = self.placed_streams(hidden, state, cu_seqlens)
        if state is not None and step.takes(self, streams.joined, state, cu_seqlens):
            return self.out_proj(self.fused_step(streams, state)), state if output_state else None
        mixed, conv_tail = convolve(self.conv, streams.conv, state, cu_seqlens, self.context_group)
        inputs, skip = self.inputs(mixed, streams)
        scales = None if self.level_scale is None else self.level_scale(hidden, streams.dl)
        o, new_state = mix(
            inputs,
            scales,
            state,
            conv_tail,
            output_state,
            cu_seqlens,
            cu_seqlens_cpu,
            self.context_group,
            self.unit_length,
        )
        return self.outputs(o, streams.gate, skip), new_state

    def placed_streams(
        self, hidden: Tensor, state: RecurrentMixerState | None, cu_seqlens: Tensor | None = None
    ) -> Streams:
        """``project(hidden)``, with the positions for a mixer that reads them."""
        streams = self.project(hidden)
        if not self.reads_positions:
            return streams
        return streams._replace(position=positions(streams.conv, state, cu_seqlens, self.context_group))

    def joint(self, hidden: Tensor, scaled: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``in_proj`` of hidden (of ``scaled`` in its place), and λ's projection of hidden."""
        dl_proj = None if self.level_scale is None else self.level_scale.dl_proj
        if scaled is None:
            return projections(hidden, self.in_proj, dl_proj)
        return project(scaled, self.in_proj), None if dl_proj is None else project(hidden, dl_proj)
