"""Log-linear models on vLLM: ``vllm serve RUN``, once the extra ``vllm`` is installed.

vLLM finds ``register`` by its entry point ``vllm.general_plugins`` in each of its processes. This file is all that touches
vLLM's interfaces. ``models/packed.py`` has the model and ``layers/pages.py`` its states, in plain PyTorch. A recurrent mixer
runs through the operator ``vllm::loglinear_mix``, which no compiler looks into.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.version import __version__

SUPPORTED = "0.32"  # these interfaces of vLLM change between releases
if __version__.split("+")[0].split(".")[:2] != SUPPORTED.split("."):
    raise ImportError(f"loglinear.integrations.vllm supports vLLM {SUPPORTED}: got vLLM {__version__}")

# ruff: noqa: E402
from vllm import ModelRegistry
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, get_temporal_copy_spec
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMambaPrefixCaching
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata, BaseMambaAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

from loglinear.layers.pages import Batch, Mixer, PageLayout, mix
from loglinear.models import LogLinearConfig
from loglinear.models.levels import FIELD
from loglinear.models.packed import PackedDecoder, load, page_bytes, page_layouts, take_over

BACKEND, OPERATOR = "LOG_LINEAR", "vllm::loglinear_mix"
MODELS = ("LogLinearForCausalLM", "LiftedForCausalLM")  # ours, and lifted ones of transformers
OPTION = '--hf-overrides \'{"architectures": ["LiftedForCausalLM"], "quantization_config": null}\''


def register() -> None:
    """Make the models known to vLLM, which may call this several times. transformers knows our configuration by the imports."""
    if BACKEND not in MambaAttentionBackendEnum.__members__:
        register_backend(BACKEND, f"{__name__}.LogLinearBackend", is_mamba=True)
    for name in MODELS:
        ModelRegistry.register_model(name, f"{__name__}:ServedModel")


@register_quantization_config(FIELD)
class LiftedFolder(QuantizationConfig):
    """The method that ``config.json`` of a lifted model names. vLLM's own class for the base has no place for the levels."""

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict[str, Any], user_quant: Any, hf_config: Any = None) -> None:
        """Raise ValueError for the folder of a lifted model; vLLM asks every method about every folder."""
        if hf_quant_cfg.get("quant_method") == FIELD:
            raise ValueError(f"a lifted model of transformers needs the option {OPTION} on vLLM: got none")


@dataclass
class LogLinearMetadata(BaseMambaAttentionMetadata):
    """The metadata of vLLM's for a call, and the ``Batch`` of the mixers."""

    batch: Batch | None = None


class LogLinearMetadataBuilder(BaseMambaAttentionMetadataBuilder[LogLinearMetadata]):
    metadata_cls = LogLinearMetadata
    needs_causal_conv1d_metadata = False
    supports_update_block_table = False
    _cudagraph_support = AttentionCGSupport.NEVER  # the operator runs between graphs

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **kwargs: Any) -> Any:
        made = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
        device = common_attn_metadata.query_start_loc.device
        none = torch.empty(0, dtype=torch.int64, device=device)
        steps, pages, fresh, offsets, offsets_cpu = none, none, none.bool(), none, none.cpu()
        if made.num_decodes:
            steps = made.state_indices_tensor_d[: made.num_decodes, 0].long()
        if made.num_prefills:
            pages, fresh = made.state_indices_tensor_p.long(), ~made.has_initial_states_p
            offsets = made.query_start_loc_p
            offsets_cpu = common_attn_metadata.query_start_loc_cpu[-made.num_prefills - 1 :] - made.num_decode_tokens
        made.batch = Batch(steps, pages, fresh, offsets, offsets_cpu)
        return made


class LogLinearBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_builder_cls() -> type[LogLinearMetadataBuilder]:
        return LogLinearMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


def refuse(vllm_config: VllmConfig) -> None:
    """Raise ValueError for an option of vLLM's that the models do not have, and that vLLM does not refuse by itself."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    refused = {
        "--tensor-parallel-size": (parallel.tensor_parallel_size, (1,)),
        "--quantization": (vllm_config.model_config.quantization, (None,)),
        "--enable-lora": (vllm_config.lora_config is not None, (False,)),
        "--speculative-config": (vllm_config.speculative_config, (None,)),
        "--load-format": (vllm_config.load_config.load_format, ("auto", "hf", "safetensors")),  # transformers loads
        "--mamba-cache-dtype": (cache.mamba_cache_dtype, ("auto",)),
        "--mamba-ssm-cache-dtype": (cache.mamba_ssm_cache_dtype, ("auto", "float32", "bfloat16")),
    }
    for option, (given, known) in refused.items():
        if given not in known:
            raise ValueError(f"{option} must be {' or '.join(map(str, known))} for log-linear models: got {given}")


def layouts_of(vllm_config: VllmConfig) -> dict[str, PageLayout]:
    """The layout of a page for each recurrent mixer. Lifted models have float32 entries without an option."""
    refuse(vllm_config)
    model, asked = vllm_config.model_config, vllm_config.cache_config.mamba_ssm_cache_dtype
    entries = getattr(model.hf_config, "decoding_entry_dtype", "float32") if asked == "auto" else asked
    return page_layouts(model.hf_config, model.dtype, model.max_model_len, getattr(torch, entries))


class PagedLayer(nn.Module, MambaBase):
    """Runs a mixer on its pages, which vLLM binds."""

    def __init__(self, mixer: Mixer, layout: PageLayout, nbytes: int, path: str) -> None:
        super().__init__()
        self.mixer, self.layout, self.nbytes, self.path = mixer, layout, nbytes, path
        self.state: Any = None
        self.kv_cache = (torch.tensor([]),)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = torch.empty_like(hidden)
        torch.ops.vllm.loglinear_mix(hidden, mixed, self.path)
        return mixed

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        self.state = self.layout.view(self.kv_cache[0])

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.nbytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.int8,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum[BACKEND]


def loglinear_mix(hidden: Tensor, mixed: Tensor, layer_name: str) -> None:
    """Write the mixer's outputs for ``hidden`` to ``mixed``, both ``[N, hidden_size]``; zeros for padding behind the tokens."""
    context = get_forward_context()
    layer = context.no_compile_layers[layer_name]
    if context.attn_metadata is None:  # vLLM measures memory, and there are no pages yet
        mixed.copy_(layer.mixer(hidden.unsqueeze(0))[0].squeeze(0))
        return
    metadata = context.attn_metadata[layer_name]
    count = metadata.num_decode_tokens + metadata.num_prefill_tokens
    mixed[:count] = mix(layer.mixer, hidden[:count], layer.state, metadata.batch)
    mixed[count:] = 0


direct_register_custom_op(op_name="loglinear_mix", op_func=loglinear_mix, mutates_args=["mixed"])


class VllmEngine:
    """vLLM's layers for ``take_over``."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        self.config, self.prefix = vllm_config, f"{prefix}." if prefix else ""
        self.layouts = layouts_of(vllm_config)
        self.nbytes = page_bytes(self.layouts)

    def mixer(self, path: str, mixer: Mixer) -> nn.Module:
        layer = PagedLayer(mixer, self.layouts[path], self.nbytes, self.prefix + path)
        self.config.compilation_config.static_forward_context[layer.path] = layer
        return layer

    def attention(self, path: str, heads: int, kv_heads: int, width: int, scale: float) -> nn.Module:
        cache, name = self.config.cache_config, f"{self.prefix}{path}.attn"
        return Attention(heads, width, scale, num_kv_heads=kv_heads, cache_config=cache, prefix=name)


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0},
    enable_if=lambda vllm_config: isinstance(vllm_config.model_config.hf_config, LogLinearConfig),
)
class CompiledDecoder(PackedDecoder):
    """The decoder. vLLM compiles that of a model of ours."""


class ServedModel(nn.Module, HasInnerState, IsHybrid, SupportsMambaPrefixCaching):
    """A model of ours or a lifted one, whose states are pages of vLLM's."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        engine, asked = VllmEngine(vllm_config, prefix), vllm_config.model_config
        split = vllm_config.compilation_config.splitting_ops
        if split and OPERATOR not in split:
            split.append(OPERATOR)
        files = dict(revision=asked.revision, cache_dir=vllm_config.load_config.download_dir)
        self.model = load(asked.model, asked.hf_config, asked.dtype, **files).to(vllm_config.device_config.device)
        take_over(self.model, engine)
        self.decoder = CompiledDecoder(model=self.model)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return ((page_bytes(layouts_of(vllm_config)),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return (torch.int8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        return (get_temporal_copy_spec,)  # a page is copied whole

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
        return self.decoder(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        return head(hidden_states.to(head.weight.dtype))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The names of all parameters: transformers has loaded them, and ``weights`` is not read."""
        return {name for name, _ in self.named_parameters()}
