"""LAYERS: torch modules built on the ops. Every mixer is called alike and the model does not know which one it holds.

    out, new_state = mixer(hidden, state=None, output_state=False, cu_seqlens=None, cu_seqlens_cpu=None)

* ``hidden [B, T, hidden_size]`` to ``out`` of the same shape. T may be anything from 0.
* ``state``: what an earlier call returned, one row per sequence, rows at positions of their own. The call goes on from there
  exactly: prefill, chunked prefill and single tokens are one function at different T. A state is never written into, except
  one *for decoding* (``state.for_decoding(max_context)``), which outside of autograd is updated in place and returned itself.
* ``output_state``: whether to return the state after the last token (None otherwise).
* ``cu_seqlens``: integer ``[n + 1]``, offsets of n sequences packed along T in a batch of one. They cannot see each other,
  and states have n rows. ``cu_seqlens_cpu``, the same on the CPU, spares a device synchronisation.

After ``set_context_group(module, group)`` the T tokens are a rank's span of one sequence, without states and packing.
"""

from loglinear.layers.attention import SoftmaxAttention
from loglinear.layers.context import set_context_group
from loglinear.layers.conv import ShortConvolution
from loglinear.layers.gated_deltanet import LogLinearGatedDeltaNet
from loglinear.layers.gla import LogLinearGLA
from loglinear.layers.kda import LogLinearKDA
from loglinear.layers.level_scale import LevelScale
from loglinear.layers.mamba2 import LogLinearMamba2
from loglinear.layers.mixer import RecurrentMixer, Streams
from loglinear.layers.norm import GatedRMSNorm, OutputGate, RMSNorm, SumRMSNorm
from loglinear.layers.retention import LogLinearRetention
from loglinear.layers.state import KVState, MixerState, RecurrentMixerState
from loglinear.layers.table import MIXERS, MixerKind

__all__ = [
    "MIXERS",
    "GatedRMSNorm",
    "KVState",
    "LevelScale",
    "LogLinearGLA",
    "LogLinearGatedDeltaNet",
    "LogLinearKDA",
    "LogLinearMamba2",
    "LogLinearRetention",
    "MixerKind",
    "MixerState",
    "OutputGate",
    "RMSNorm",
    "RecurrentMixer",
    "RecurrentMixerState",
    "ShortConvolution",
    "SoftmaxAttention",
    "Streams",
    "SumRMSNorm",
    "set_context_group",
]
