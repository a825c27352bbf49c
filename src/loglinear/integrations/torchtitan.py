"""Log-linear models for torchtitan, PyTorch's pretraining stack: ``--module loglinear.integrations.torchtitan``.

The model is ``LogLinearForCausalLM`` without changes. The module adds the parts that torchtitan 0.3 asks of a model: a config,
an initialisation of shards, FSDP2 with activation checkpointing and compilation, names for Hugging Face, and one
configuration for each ``--config``. Sharding works as in ``loglinear train``: float32 shards, mixed precision by autocast.
Documents packed into a row stay apart. The module refuses tensor, context and pipeline parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan.config import TORCH_DTYPE_MAP, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.fsdp import disable_fsdp_gradient_division
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.trainer import Trainer

from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.models.sizes import count_parameters
from loglinear.training.sharding import shard, shard_like

PREFIX = "causal."
UNDECAYED = r"(A_log|dt_bias|\.D|\.L|bias|norm\w*\.weight)$"


class LogLinearTitan(BaseModel):
    """``LogLinearForCausalLM`` behind torchtitan's interface: tokens and positions in, logits out."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        fields: dict[str, Any] = field(default_factory=dict)
        """Fields of ``LogLinearConfig``; the longest context is the trainer's sequence length."""

        def model_config(self) -> LogLinearConfig:
            return LogLinearConfig(**self.fields)

        def update_from_config(self, *, config, **kwargs) -> None:
            self.fields = {**self.fields, "max_position_embeddings": config.training.seq_len}

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """Parameters, and floating-point operations of a token: six for each parameter outside the input embeddings.

            The mixing of tokens is not counted.
            """
            config = self.model_config()
            parameters = count_parameters(config)
            return parameters, 6 * (parameters - config.vocab_size * config.hidden_size)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.causal = LogLinearForCausalLM(config.model_config())
        self.autocast_dtype = torch.float32

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, where torchtitan looks for them."""
        return self.causal.model.layers

    def verify_module_protocol(self) -> None:
        """Nothing to verify: the model's modules are plain ones, initialised here."""

    @torch.no_grad()
    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Initialise the model as transformers does, one module at a time. Each process keeps its shard of a module.

        Every process draws the same numbers, because torchtitan gives all processes one seed.
        """
        for module in self.causal.modules():
            shards = dict(module.named_parameters(recurse=False))
            for name, parameter in shards.items():
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device=parameter.device))
            self.causal._init_weights(module)
            for name, parameter in shards.items():
                parameter.copy_(shard_like(module.get_parameter(name), parameter))
                module._parameters[name] = parameter

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, vocab_size]`` of tokens ``[B, T]``. A document starts where ``positions`` do not grow by one."""
        with torch.autocast(tokens.device.type, self.autocast_dtype, self.autocast_dtype != torch.float32):
            return self.causal(input_ids=tokens, position_ids=positions, use_cache=False).logits


class LogLinearStateDict(StateDictAdapter):
    """Names of ``LogLinearForCausalLM``, so that checkpoints in Hugging Face's format load with ``from_pretrained``."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix(PREFIX): value for name, value in state_dict.items()}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return {PREFIX + name: value for name, value in hf_state_dict.items()}


def parallelize(
    model: LogLinearTitan, *, parallel_dims: ParallelDims, training, parallelism, compile_config, ac_config, dump_folder
) -> LogLinearTitan:
    """Activation checkpointing, compilation and FSDP2 (or HSDP) over the blocks and the rest, in this order."""
    for name in ("tp", "cp", "pp", "ep"):
        if getattr(parallel_dims, name) > 1:
            raise ValueError(f"{name} must be 1 for log-linear models: got {getattr(parallel_dims, name)}")
    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(model)
    if compile_config.enable and "model" in compile_config.components:
        apply_compile(model, compile_config=compile_config, parallel_dims=parallel_dims)
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    shard(model.causal, parallel_dims.get_mesh(names))
    disable_fsdp_gradient_division(model)  # the loss is divided by the tokens of all processes
    model.autocast_dtype = TORCH_DTYPE_MAP[training.mixed_precision_param]
    return model


def model_spec(flavor: str, **fields) -> ModelSpec:
    """The model with these fields of ``LogLinearConfig``, for your own configuration."""
    return ModelSpec(
        name="loglinear",
        flavor=flavor,
        model=LogLinearTitan.Config(fields=fields),
        parallelize_fn=parallelize,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=LogLinearStateDict,
    )


def _groups(learning_rate: float) -> Iterator[ParamGroupConfig]:
    """AdamW that decays matrices, but no norms, biases or parameters of decays and levels."""
    for pattern, decay in ((UNDECAYED, 0.0), (r".*", 0.1)):
        options = {"lr": learning_rate, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay}
        yield ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs=options)


def _configuration(spec: ModelSpec, training: TrainingConfig, learning_rate: float, dataset: str) -> Trainer.Config:
    warmup = max(1, training.steps // 20)
    training.disable_cuda_graphs = True  # the host reads where documents end
    return Trainer.Config(
        model_spec=spec,
        loss=CrossEntropyLoss.Config(global_vocab_size=spec.model.fields["vocab_size"]),
        optimizer=OptimizersContainer.Config(param_groups=list(_groups(learning_rate))),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=warmup, decay_type="cosine", min_lr_factor=0.1),
        training=training,
        dataloader=HuggingFaceTextDataLoader.Config(dataset=dataset),
        metrics=MetricsProcessor.Config(log_freq=10),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        checkpoint=CheckpointManager.Config(interval=500),
        activation_checkpoint=FullAC.Config(),
    )


def log_linear_mamba2_800m() -> Trainer.Config:
    """The paper's Log-Linear Mamba-2: 21 layers of width 1536, contexts of 16K, half a million tokens a step on 8 GPUs."""
    training = TrainingConfig(local_batch_size=4, seq_len=16_384, steps=100_000)
    return _configuration(model_spec("800M", vocab_size=32_000), training, 3e-4, "c4")


def log_linear_gated_deltanet_800m() -> Trainer.Config:
    """The paper's Log-Linear Gated DeltaNet: layers, contexts and steps as above."""
    training = TrainingConfig(local_batch_size=4, seq_len=16_384, steps=100_000)
    spec = model_spec("800M", mixer="log_linear_gated_deltanet", vocab_size=32_000)
    return _configuration(spec, training, 3e-4, "c4")


def log_linear_mamba2_debug() -> Trainer.Config:
    """Ten steps of a tiny model on the text that torchtitan's repository brings."""
    training = TrainingConfig(local_batch_size=2, seq_len=256, steps=10)
    spec = model_spec("debug", vocab_size=2048, hidden_size=64, num_hidden_layers=2, mamba_state_size=16)
    return _configuration(spec, training, 1e-3, "c4_test")
