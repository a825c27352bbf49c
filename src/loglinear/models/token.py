"""TOKEN: a layer of the decoder on one token, or a few, as four products and the sequence mixing between them.

``LogLinearBlock.forward`` is the definition. Where a call is too small for anything but launches and the reading of weights to
take time, this is the same layer in about half the launches: see ``ops/products.py``. ``why_not`` says which calls are taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from loglinear.layers import RecurrentMixerState, step
from loglinear.layers.linear import Normed, bare, plain
from loglinear.layers.mixer import RecurrentMixer
from loglinear.models.cache import MixerCacheLayer
from loglinear.models.layout import TokenLayout
from loglinear.ops import products

if TYPE_CHECKING:
    from loglinear.models.modeling import LogLinearBlock


def why_not(block: LogLinearBlock, hidden: Tensor, layout: TokenLayout, cache: MixerCacheLayer) -> str | None:
    """Why a layer runs line by line; None where ``forward`` here takes hidden ``[B, T, hidden_size]``."""
    mixer, mlp, state = block.mixer, block.mlp, cache.state
    if not isinstance(mixer, RecurrentMixer) or not isinstance(state, RecurrentMixerState):
        return "a mixer without a state, or a text's start"
    if layout.cu_seqlens is not None or layout.real is not None or cache.record_past:
        return "padding, documents, or columns that may be taken back"
    linear: list[nn.Module] = [mixer.in_proj, mixer.out_proj]
    around: list[nn.Module] = [mixer, block.mixer_norm]
    if mixer.level_scale is not None:
        linear.append(mixer.level_scale.dl_proj)
    if mlp is not None and block.mlp_norm is not None:
        linear += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        around += [mlp, block.mlp_norm]
    if not all(map(plain, linear)) or not all(map(bare, around)):
        return "layers with adapters, hooks, a bias or weights of another kind"
    found = products.why_not(hidden, *(layer.get_parameter("weight") for layer in linear))
    if found is None and not step.takes(mixer, hidden, state, None):
        found = "a step that no kernel takes"
    return found


def forward(block: LogLinearBlock, hidden: Tensor, layout: TokenLayout, cache: MixerCacheLayer) -> Tensor:
    """hidden ``[B, T, hidden_size]`` behind the layer; its state in the cache takes the tokens in."""
    mixer, mlp, norm = block.mixer, block.mlp, block.mlp_norm
    assert isinstance(mixer, RecurrentMixer)
    cache.reserve(layout.length)
    state, out = cache.state, mixer.out_proj.get_parameter("weight")
    assert isinstance(state, RecurrentMixerState)
    normed: Any = Normed(hidden, block.mixer_norm)  # of which a mixer asks its projections alone
    mixed = mixer.token_step(mixer.placed_streams(normed, state), state)
    cache.store(state, layout.length)
    if isinstance(mixed, Normed):
        after = mixed.norm.weight, mixed.norm.eps, state.memory.position
        hidden = products.summed(mixed.x, out, hidden, *after)
    else:
        hidden = products.summed(mixed, out, hidden)
    if mlp is None or norm is None:
        return hidden
    inner = products.swiglu(hidden, mlp.gate_proj.weight, mlp.up_proj.weight, norm.weight, norm.eps)
    return products.summed(inner, mlp.down_proj.weight, hidden)
