"""ENGINE: a log-linear model as vLLM wants it.

The layers are those of ``LogLinearModel``. A recurrent mixer lies in a ``PagedMixer``, whose states are pages of vLLM's, and
runs through the operator ``loglinear::mix``, which no compiler looks into. Softmax attention is vLLM's own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, get_temporal_copy_spec
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMambaPrefixCaching
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport
from vllm.v1.attention.backends.mamba_attn import BaseMambaAttentionMetadata, BaseMambaAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from loglinear.integrations.vllm import BACKEND
from loglinear.layers import RMSNorm, SoftmaxAttention
from loglinear.layers.attention import rotary
from loglinear.layers.pages import Batch, PageLayout, mix
from loglinear.layers.table import MIXERS
from loglinear.models.configuration import LogLinearConfig
from loglinear.models.modeling import LogLinearBlock

OPERATOR = "vllm::loglinear_mix"


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


def entry_dtype(vllm_config: VllmConfig) -> torch.dtype:
    """Of log-linear entries: that of ``--mamba-ssm-cache-dtype``, or else the checkpoint's ``decoding_entry_dtype``.

    Configs of transformers lack this field. Their lifted models have float32 entries.
    """
    asked = vllm_config.cache_config.mamba_ssm_cache_dtype
    if asked not in ("auto", "float32", "bfloat16"):
        raise ValueError(
            f"--mamba-ssm-cache-dtype must be auto, float32 or bfloat16 for log-linear models: got {asked}"
        )
    config = vllm_config.model_config.hf_config
    return getattr(torch, getattr(config, "decoding_entry_dtype", "float32") if asked == "auto" else asked)


def page_layouts(vllm_config: VllmConfig) -> dict[str, PageLayout]:
    """The layout of a page for every kind of recurrent mixer of the model."""
    model = vllm_config.model_config
    config: LogLinearConfig = model.hf_config
    layouts = {}
    for name in dict.fromkeys(config.layer_mixers):
        if MIXERS[name].recurrent:
            with torch.device("meta"):
                mixer = MIXERS[name].build(config).to(model.dtype)
            layouts[name] = PageLayout.of(
                mixer, config.hidden_size, model.dtype, model.max_model_len, entry_dtype(vllm_config)
            )
    return layouts


def page_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of a page, one size for all layers; 0 for a model of softmax attention alone."""
    return max((layout.nbytes for layout in page_layouts(vllm_config).values()), default=0)


class Tokens:
    """The tokens of a call, ``[N]``, in place of ``TokenLayout``: a block runs its mixer through it."""

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions

    def run(self, mixer: nn.Module, hidden: Tensor) -> tuple[Tensor, None]:
        return mixer(hidden, self.positions), None


class PagedMixer(nn.Module, MambaBase):
    """A recurrent mixer and its pages, which vLLM binds."""

    def __init__(
        self, mixer: nn.Module, layout: PageLayout, page_bytes: int, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        self.mixer, self.layout, self.page_bytes, self.prefix = mixer, layout, page_bytes, prefix
        self.state: Any = None
        self.kv_cache = (torch.tensor([]),)
        vllm_config.compilation_config.static_forward_context[prefix] = self

    @property
    def call(self) -> Callable[..., Any]:
        """The mixer, called as the mixers of ``loglinear.layers`` are."""
        return self.mixer

    def forward(self, hidden: Tensor, *others: Any, **named: Any) -> Tensor:
        """Outputs for hidden ``[N, hidden_size]``, the tokens of a call. Its pages know their positions and all else."""
        mixed = torch.empty_like(hidden)
        torch.ops.vllm.loglinear_mix(hidden, mixed, self.prefix)
        return mixed

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        self.state = self.layout.view(self.kv_cache[0])

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.page_bytes,),)

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
        out, _ = layer.call(hidden.unsqueeze(0))
        mixed.copy_(out.squeeze(0))
        return
    metadata = context.attn_metadata[layer_name]
    count = metadata.num_decode_tokens + metadata.num_prefill_tokens
    mixed[:count] = mix(layer.call, hidden[:count], layer.state, metadata.batch)
    mixed[count:] = 0


direct_register_custom_op(op_name="loglinear_mix", op_func=loglinear_mix, mutates_args=["mixed"])


class PagedAttention(nn.Module):
    """The projections and rotary positions of ``SoftmaxAttention``, around vLLM's attention."""

    def __init__(self, mixer: SoftmaxAttention, config: LogLinearConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.mixer = mixer
        self.attn = Attention(
            config.num_attention_heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=config.num_key_value_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        mixer = self.mixer
        q, k, v = (
            proj(hidden).unflatten(-1, (-1, mixer.head_dim)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        )
        q, k = (x.squeeze(0) for x in rotary(positions.unsqueeze(0), mixer.rope_theta, q.unsqueeze(0), k.unsqueeze(0)))
        return mixer.out_proj(self.attn(q.flatten(-2), k.flatten(-2), v.flatten(-2)))


@support_torch_compile
class LogLinearModel(nn.Module):
    """The decoder without its output layer, on packed tokens."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: LogLinearConfig = vllm_config.model_config.hf_config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LogLinearBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        layouts, size = page_layouts(vllm_config), page_bytes(vllm_config)
        block: Any
        for i, (name, block) in enumerate(zip(config.layer_mixers, self.layers)):
            path = f"{prefix}.layers.{i}.mixer"
            if name in layouts:
                block.mixer = PagedMixer(block.mixer, layouts[name], size, vllm_config, path)
            else:
                block.mixer = PagedAttention(block.mixer, config, vllm_config, path)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = Tokens(positions)
        for block in self.layers:
            hidden = block.forward(hidden, tokens)
        return self.norm(hidden)


def refuse(vllm_config: VllmConfig) -> None:
    """Raise ValueError for an option of vLLM's that this model does not have, and that vLLM does not refuse by itself."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    refused = {
        "--tensor-parallel-size": (parallel.tensor_parallel_size, 1),
        "--quantization": (vllm_config.model_config.quantization, None),
        "--enable-lora": (vllm_config.lora_config is not None, False),
        "--speculative-config": (vllm_config.speculative_config, None),
        "--mamba-cache-dtype": (cache.mamba_cache_dtype, "auto"),
    }
    for option, (given, only) in refused.items():
        if given != only:
            raise ValueError(f"{option} must be {only} for log-linear models: got {given}")
    entry_dtype(vllm_config)


class Paged(nn.Module, HasInnerState, IsHybrid, SupportsMambaPrefixCaching):
    """A model with pages: the answers to vLLM before the model is made, and the function that copies a page."""

    @classmethod
    def page_bytes(cls, vllm_config: VllmConfig) -> int:
        """Bytes of a page, one size for all layers."""
        raise NotImplementedError

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return ((cls.page_bytes(vllm_config),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return (torch.int8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        return (get_temporal_copy_spec,)  # a page is copied whole


class LogLinearForCausalLM(Paged):
    """``loglinear.models.LogLinearForCausalLM`` on vLLM, with the same names of weights in a checkpoint."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        refuse(vllm_config)
        self.config: LogLinearConfig = vllm_config.model_config.hf_config
        split = vllm_config.compilation_config.splitting_ops
        if split and OPERATOR not in split:
            split.append(OPERATOR)
        self.model = LogLinearModel(vllm_config=vllm_config, prefix=f"{prefix}.model" if prefix else "model")
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def page_bytes(cls, vllm_config: VllmConfig) -> int:
        return page_bytes(vllm_config)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.lm_head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Every weight of a checkpoint by its name there. Raises ValueError for one that is missing or has no place."""
        own = {name.replace(".mixer.mixer.", ".mixer."): (name, x) for name, x in self.named_parameters()}
        loaded = set()
        for name, weight in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            if name not in own:
                raise ValueError(f"the checkpoint must hold weights of a LogLinearForCausalLM: got {name}")
            path, parameter = own.pop(name)
            default_weight_loader(parameter, weight)
            loaded.add(path)
        if own:
            raise ValueError(
                f"the checkpoint must hold every weight: {len(own)} are missing, {', '.join(list(own)[:3])}"
            )
        return loaded
