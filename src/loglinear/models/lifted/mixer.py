"""LiftedMixer: a log-linear mixer at the place of a linear one, in a model of transformers.

It is one of our mixers with the parameters, buffers and submodules of the original under their old names, so checkpoints,
adapters and optimizers find everything where it was. Only ``level_scale`` is new. Its forward is called as the original's.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from loglinear.layers import GatedRMSNorm, LevelScale, RecurrentMixer, ShortConvolution
from loglinear.models.lifted.cache import run
from loglinear.models.lifted.plans import Plans
from loglinear.models.outputs import one_cache

# Models hand these to every layer, and no linear mixer reads them: positions and switches of attention, and of losses.
FOR_OTHERS = {
    "position_ids",
    "position_embeddings",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "num_items_in_batch",
    "return_dict",
    "is_causal",
}
# Packed documents, which ``run`` reads.
FOR_PACKING = {"seq_idx", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


class LiftedMixer(RecurrentMixer):
    """Base of the lifted mixers: ``class LiftedX(LiftedMixer, LogLinearX)``. Made by ``of``."""

    layer_idx: int
    plans: Plans  # that all mixers of the model share
    conv1d: ShortConvolution
    parts: frozenset[str] = frozenset()  # names of the parameters, buffers and submodules that an original may have
    norm_name: str = "norm"  # of the output norm
    like: str = "conv1d"  # a submodule whose weight has the dtype of the activations, and is never quantised

    @classmethod
    @abstractmethod
    def fields(cls, original: nn.Module) -> dict[str, Any]:
        """The arguments of our mixer that make it the original. Raises ValueError for a property that ours lacks."""

    @classmethod
    def of(cls, original: nn.Module, num_levels: int, plans: Plans) -> Self:
        """The lifted form of a linear mixer, whose tensors it shares. The original stays as it is.

        Raises ValueError for a property that our mixer lacks; the message names it.
        """
        check_parts(original, cls.parts)
        fields = cls.fields(original)
        with torch.device("meta"):  # every tensor of it is replaced
            lifted = cls(**fields, log_linear=False)
        lifted.adopt(original)
        lifted.plans = plans
        like = original.get_parameter(f"{cls.like}.weight")
        lifted.level_scale = level_scale(fields["hidden_size"], lifted.num_heads, num_levels, like)
        return lifted.train(original.training)

    def adopt(self, original: nn.Module) -> None:
        """Take the original's parameters, buffers, submodules and hooks, in its order."""
        norm, conv = self._modules["norm"], self._modules["conv"]
        for own in (self._parameters, self._buffers, self._modules):
            own.clear()
        self.level_scale = None
        for name, parameter in original._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in original._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in original._non_persistent_buffers_set)
        for name, module in original._modules.items():
            self.add_module(name, module)
        if "conv1d" in original._modules:
            conv = AdoptedConvolution(self.conv1d, original.activation)  # type: ignore[arg-type]
        self.conv1d = conv  # type: ignore[assignment]
        if isinstance(norm, GatedRMSNorm):
            norm.weight = getattr(original, self.norm_name).weight
            norm.train(original.training)
        setattr(self, self.norm_name, norm)
        self.layer_idx = original.layer_idx  # type: ignore[assignment]
        for name, hooks in vars(original).items():
            if "forward" in name and name.endswith(("_hooks", "_with_kwargs", "_always_called")):
                self.__dict__[name] = hooks

    @property
    def conv(self) -> ShortConvolution:  # type: ignore[override]
        """The convolution, by our name."""
        return self.conv1d

    mix = RecurrentMixer.forward  # called as our mixers are

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the original's: ``[B, T, hidden_size]`` to the same.

        Args:
            cache_params, cache, past_key_values: the model's cache, by the names of the versions of transformers.
            attention_mask: ``[B, T]``, 1 for tokens and 0 for padding. Padding never changes what real tokens compute.
            seq_idx, cu_seq_lens_q and what comes with it: packed documents. Arguments of attention layers are let through.

        Raises:
            TypeError: an argument that no linear mixer knows.
        """
        unknown = [name for name in kwargs if name not in FOR_OTHERS and name not in FOR_PACKING]
        if unknown:
            raise TypeError(f"forward does not know these arguments: {', '.join(unknown)}")
        packing = {name: x for name, x in kwargs.items() if name in FOR_PACKING}
        cache = one_cache(one_cache(cache, past_key_values), cache_params)
        return run(self, hidden_states, cache, attention_mask, plans=self.plans, **packing)


class NamesWithO(LiftedMixer):
    """Originals whose output norm and output projection are called ``o_norm`` and ``o_proj``."""

    norm_name = "o_norm"
    o_norm: GatedRMSNorm
    o_proj: nn.Module

    @property
    def norm(self) -> GatedRMSNorm:  # type: ignore[override]
        """The output norm, by our name."""
        return self.o_norm

    @property
    def out_proj(self) -> nn.Module:  # type: ignore[override]
        """The output projection, by our name."""
        return self.o_proj


class AdoptedConvolution(ShortConvolution):
    """The short convolution with the tensors of a ``Conv1d``, whose weight is ``[channels, 1, W]``.

    A float32 weight in a model of 16 bits asks for a convolution in float32.
    """

    def __init__(self, original: nn.Conv1d, activation: str) -> None:
        with torch.device("meta"):
            super().__init__(
                original.in_channels, original.kernel_size[0], original.bias is not None, activation=activation
            )
        self.weight, self.bias = original.weight, original.bias  # type: ignore[assignment]
        self.train(original.training)

    @property
    def taps(self) -> Tensor:
        return self.weight.squeeze(1)

    def forward(
        self,
        x: Tensor,
        tail: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        in_place: bool = False,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.weight.dtype != torch.float32 or x.dtype.itemsize > 2 or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, tail, cu_seqlens, in_place, rows)
        y, new_tail = super().forward(x.float(), tail, cu_seqlens, in_place, rows)
        return y.to(x.dtype), new_tail if in_place else new_tail.to(x.dtype)


def check_parts(original: nn.Module, known: frozenset[str]) -> None:
    """Raise ValueError for an original that is not called as its class says, or holds tensors of unknown meaning."""
    if "forward" in vars(original):
        raise ValueError("forward must be that of its class: got one of its own (hooks of accelerate, a compiled one)")
    names = [*original._parameters, *original._buffers, *original._modules]
    surplus = [name for name in names if name not in known]
    if surplus:
        raise ValueError(f"parameters and submodules must be among {sorted(known)}: got {', '.join(surplus)} too")


def check_convolution(conv: Any) -> None:
    """Raise ValueError unless ``conv`` is a causal depthwise ``Conv1d``."""
    if not isinstance(conv, nn.Conv1d):
        raise ValueError(f"conv1d must be a Conv1d: got {type(conv).__name__}")
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    if not depthwise or conv.stride != (1,) or conv.dilation != (1,) or conv.padding_mode != "zeros":
        raise ValueError(f"conv1d must be depthwise, of stride and dilation 1: got {conv}")


def gated_norm_eps(norm: Any) -> float:
    """The eps of a gated norm. Raises ValueError for a norm of an unknown class."""
    known = type(norm).__name__.endswith("RMSNormGated") and hasattr(norm, "variance_epsilon")
    if not known or [*norm._parameters] != ["weight"] or norm._modules:
        raise ValueError(f"norm must be a gated RMSNorm with a weight: got {type(norm).__name__}")
    return norm.variance_epsilon


def level_scale(hidden_size: int, num_heads: int, num_levels: int, like: Tensor) -> LevelScale:
    """λ of a mixer, 1 on every level whatever comes in, with the device and the dtype of ``like``."""
    added = LevelScale(hidden_size, num_heads, num_levels, start="one")
    nn.init.zeros_(added.dl_proj.weight)
    return added.to(like.device, like.dtype)
