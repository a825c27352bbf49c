"""What a training run is, as dataclasses. Nothing heavy is imported: the command line builds them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from loglinear.tasks.lm.config import DataConfig

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class ModelConfig:
    """The decoder: fields of `LogLinearConfig` by the same names. Models of different kinds differ in the mixer alone."""

    mixer: tuple[str, ...] = ("log_linear_mamba2",)
    """One name for all layers or one per layer, of: log_linear_mamba2, mamba2, log_linear_gated_deltanet,
    gated_deltanet, attention."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_hidden_layers: int = 4
    """Blocks of mixer and MLP."""
    intermediate_size: int | None = None
    """Inner width of the MLP; none: 8/3 of hidden_size; 0: no MLP."""
    mamba_head_dim: int = 64
    """Width of a value head of the Mamba-2 mixers."""
    mamba_state_size: int = 64
    """Width of a key of the Mamba-2 mixers."""
    delta_num_heads: int = 4
    """Heads of the Gated DeltaNet mixers."""
    num_attention_heads: int | None = None
    """Heads of the attention mixer; none: heads of 64."""
    tie_word_embeddings: bool = True
    """Use one matrix for the input and output embeddings."""
    residual_in_fp32: bool = True
    """Keep the residual stream in float32 under bfloat16; off, checkpointed activations take half the memory."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and a cosine, batches, and precision."""

    steps: int = 1000
    """Optimizer steps in the whole run."""
    batch_size: int = 8
    """Sequences per process and forward pass."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 1e-3
    """Peak learning rate; the cosine ends at a tenth of it."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from zero."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two averages."""
    weight_decay: float = 0.1
    """Applied to matrices only: not to norms, biases, or parameters marked `_no_weight_decay`."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    precision: Precision = "auto"
    """auto: bfloat16 autocast on a GPU that has it, float32 otherwise."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: got {getattr(self, name)}")
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, inf to leave gradients as they are: got {self.clip}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), a share of the steps: got {self.warmup}")


@dataclass(frozen=True)
class TrainConfig:
    """Train a language model, or go on with a run that was interrupted."""

    output: Path
    """Folder of the run: checkpoints, TensorBoard logs, record.json and the final model."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0
    """Of the initialisation and of the order of the data."""
    log_every: int = 10
    """Steps between two logged losses."""
    save_every: int = 200
    """Steps between two checkpoints, of which the last two are kept; a multiple of log_every."""
    evaluate_every: int = 200
    """Steps between two evaluations on the validation data."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a quarter more time."""
    fsdp: bool = False
    """Shard parameters, gradients and optimizer over the processes of torchrun or accelerate launch (FSDP2)."""
    context_parallel: int = 1
    """Processes (of torchrun) that share one sequence, each a span of it, for contexts longer than one device holds."""

    def __post_init__(self) -> None:
        for name in ("log_every", "save_every", "evaluate_every", "context_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0: got {self.seed}")
        if self.fsdp and self.context_parallel > 1:
            raise ValueError(
                f"fsdp: must be off with context_parallel={self.context_parallel}: processes share one or the other"
            )
        if self.save_every % self.log_every:
            # A logged loss is a mean since the last one: a checkpoint in between would change it after a restart.
            raise ValueError(f"save_every must be a multiple of log_every: got {self.save_every} and {self.log_every}")

    def arguments(self) -> dict:
        """Everything that decides the result, flat and ready for JSON: not where the run or the cache lies."""
        flat: dict = {}
        for name, value in dataclasses.asdict(self).items():
            flat.update(value if isinstance(value, dict) else {name: value})
        del flat["output"], flat["cache"]
        for name in ("streaming", "max_documents"):  # records of older runs lack them
            if not flat[name]:
                del flat[name]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}
