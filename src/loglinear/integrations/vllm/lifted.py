"""LIFTED: a lifted model of transformers on vLLM, with the code of transformers around the mixers.

transformers loads the folder. Each lifted mixer then lies in a ``PagedMixer``, and each softmax attention gets vLLM's attention
as its ``attn``, where vLLM's function for models of transformers looks for it.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
import vllm.model_executor.models.transformers  # noqa: F401 - transformers knows the attention "vllm" from here on
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from loglinear.integrations.vllm.engine import Paged, PagedMixer, entry_dtype, refuse
from loglinear.layers.pages import PageLayout
from loglinear.models.levels import FIELD
from loglinear.models.lift import lift
from loglinear.models.lifted.kinds import is_attention
from loglinear.models.lifted.mixer import LiftedMixer

ATTENTION = ("Qwen3NextAttention",)  # softmax layers that have run on vLLM's attention


def layout_of(mixer: LiftedMixer, vllm_config: VllmConfig) -> PageLayout:
    """The layout of a page for a mixer on the meta device."""
    model = vllm_config.model_config
    width = model.hf_config.get_text_config().hidden_size
    return PageLayout.of(mixer.mix, width, model.dtype, model.max_model_len, entry_dtype(vllm_config))


def page_layouts(vllm_config: VllmConfig) -> dict[str, PageLayout]:
    """The layout of a page for each lifted mixer, by its name.

    Raises ValueError for a folder without levels, and for softmax attention that has no form here.
    """
    config = vllm_config.model_config.hf_config
    described = getattr(config, FIELD, None)
    if not described:
        raise ValueError(f"config.json must have {FIELD}, as a lifted model saves it: got {described}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=vllm_config.model_config.dtype)
    lift(model, described["num_levels"])
    mixers = {name: module for name, module in model.named_modules() if isinstance(module, LiftedMixer)}
    for name, module in model.named_modules():
        if is_attention(module) and type(module).__name__ not in ATTENTION and name not in mixers:
            raise ValueError(f"softmax attention must be one of {list(ATTENTION)} on vLLM: got {type(module).__name__}")
    return {name: layout_of(mixer, vllm_config) for name, mixer in mixers.items()}


class PagedLiftedMixer(PagedMixer):
    """Called as the layers of transformers call their mixers, with hidden states ``[1, N, hidden_size]`` and no cache."""

    @property
    def call(self) -> Callable[..., Any]:
        mixer: Any = self.mixer
        return mixer.mix

    def forward(self, hidden_states: Tensor, *others: Any, **named: Any) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states.squeeze(0)).unsqueeze(0)


class LiftedForCausalLM(Paged):
    """A folder of ``save_pretrained``, of a model that ``loglinear.lift`` has made log-linear."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        refuse(vllm_config)
        asked = vllm_config.model_config
        self.model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=asked.dtype)
        self.model.config.get_text_config()._attn_implementation = "vllm"
        self.model.to(vllm_config.device_config.device).eval()
        layouts = page_layouts(vllm_config)
        size = max(layout.nbytes for layout in layouts.values())
        for name, module in list(self.model.named_modules()):
            parent, _, last = name.rpartition(".")
            path = f"{prefix}.{name}" if prefix else name
            if name in layouts:
                paged = PagedLiftedMixer(module, layouts[name], size, vllm_config, path)
                setattr(self.model.get_submodule(parent), last, paged)
            elif type(module).__name__ in ATTENTION:
                module.attn = attention(module, vllm_config, f"{path}.attn")

    @classmethod
    def page_bytes(cls, vllm_config: VllmConfig) -> int:
        return max(layout.nbytes for layout in page_layouts(vllm_config).values())

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        read = {name: x.unsqueeze(0) for name, x in given.items() if x is not None}
        out = self.model.base_model(**read, position_ids=positions.unsqueeze(0), use_cache=False)
        return out.last_hidden_state.squeeze(0)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        return head(hidden_states.to(head.weight.dtype))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The names of all parameters: transformers has loaded them, and ``weights`` is not read."""
        return {name for name, _ in self.named_parameters()}


def attention(module: nn.Module, vllm_config: VllmConfig, prefix: str) -> Attention:
    """vLLM's attention in the place of that of a softmax layer of transformers."""
    config: Any = module.config
    return Attention(
        config.num_attention_heads,
        module.head_dim,
        module.scaling,
        num_kv_heads=config.num_key_value_heads,
        cache_config=vllm_config.cache_config,
        prefix=prefix,
    )
