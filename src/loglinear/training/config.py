"""The options of a training run, as dataclasses. Nothing heavy is imported: the command line builds them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loglinear.layers.table import MIXERS
from loglinear.tasks.lm.config import DataConfig

Precision = Literal["auto", "float32", "bfloat16"]
if TYPE_CHECKING:
    Mixer = str
else:
    Mixer = Literal[tuple(MIXERS)]


class Contradiction(ValueError):
    """Options that contradict a record or the model they start from; for the command line, options that cannot be used."""


@dataclass(frozen=True)
class ModelConfig:
    """The decoder: fields of `LogLinearConfig` by the same names. Models of different kinds differ in the mixer alone.

    None leaves a field to `LogLinearConfig`.
    """

    mixer: tuple[Mixer, ...] = ("log_linear_mamba2",)
    """One name for all layers or one per layer."""
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
    mamba_num_heads: int | None = None
    """Value heads of the Mamba-2 mixers; none: as many as make twice hidden_size."""
    mamba_num_groups: int | None = None
    """Heads of queries and keys of the Mamba-2 mixers, each shared by as many value heads; none: 1."""
    delta_num_heads: int = 4
    """Value heads of the Gated DeltaNet mixers."""
    delta_num_key_heads: int | None = None
    """Heads of queries and keys of the Gated DeltaNet mixers, each shared by as many value heads; none: delta_num_heads."""
    delta_key_dim: int | None = None
    """Width of a key of the Gated DeltaNet mixers; none: 3/4 of hidden_size for delta_num_heads keys together."""
    delta_value_dim: int | None = None
    """Width of a value head of the Gated DeltaNet mixers; none: twice delta_key_dim."""
    kda_num_heads: int | None = None
    """Value heads of the KDA mixers; none: heads of 128."""
    kda_num_key_heads: int | None = None
    """Heads of queries and keys of the KDA mixers, each shared by as many value heads; none: kda_num_heads."""
    kda_key_dim: int | None = None
    """Width of a key of the KDA mixers; none: hidden_size over kda_num_heads."""
    kda_value_dim: int | None = None
    """Width of a value head of the KDA mixers; none: kda_key_dim."""
    gla_num_heads: int | None = None
    """Query heads of the GLA mixers; none: 4."""
    gla_num_kv_heads: int | None = None
    """Heads of keys and values of the GLA mixers; none: gla_num_heads."""
    gla_key_dim: int | None = None
    """Width of a key of the GLA mixers; none: half of hidden_size for gla_num_heads keys together."""
    gla_value_dim: int | None = None
    """Width of a value head of the GLA mixers; none: hidden_size over gla_num_heads."""
    gla_conv_size: int | None = None
    """Taps of the short convolutions of the GLA mixers; none: no convolution."""
    retnet_num_heads: int | None = None
    """Query heads of the RetNet mixers; none: 8."""
    retnet_num_kv_heads: int | None = None
    """Heads of keys and values of the RetNet mixers; none: retnet_num_heads."""
    retnet_key_dim: int | None = None
    """Width of a key of the RetNet mixers, even; none: hidden_size over retnet_num_heads."""
    retnet_value_dim: int | None = None
    """Width of a value head of the RetNet mixers; none: twice retnet_key_dim."""
    retnet_conv_size: int | None = None
    """Taps of the short convolutions of the RetNet mixers; none: no convolution."""
    lightning_num_heads: int | None = None
    """Heads of the lightning attention mixers; none: heads of 128."""
    lightning_head_dim: int | None = None
    """Width of a head of the lightning attention mixers; none: hidden_size over lightning_num_heads."""
    level_scale_start: Literal["paper", "one"] | None = None
    """Where the λ of log-linear mixers start: near ln 2 on every level, or near 1, as their linear twins; none: paper."""
    level_scale_std: float | None = None
    """Standard deviation of the weights that make λ, at the start; none: initializer_range; the paper's is 0.006."""
    conv_size: int | None = None
    """Taps of the short convolutions of the Mamba-2, Gated DeltaNet and KDA mixers; none: 4."""
    num_attention_heads: int | None = None
    """Heads of the attention mixer; none: heads of 64."""
    num_key_value_heads: int | None = None
    """Heads of keys and values of the attention mixer; none: num_attention_heads."""
    head_dim: int | None = None
    """Width of a head of the attention mixer; none: hidden_size over num_attention_heads."""
    rope_theta: float | None = None
    """Base of the rotary frequencies of the attention mixer; none: 500,000."""
    rms_norm_eps: float | None = None
    """Added to the mean square in every norm; none: 1e-6."""
    initializer_range: float | None = None
    """Standard deviation of new weights; none: 0.02."""
    tie_word_embeddings: bool = True
    """Use one matrix for the input and output embeddings."""
    residual_in_fp32: bool = True
    """Keep the residual stream in float32 under bfloat16; off, checkpointed activations take half the memory."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and a cosine, batches, and precision."""

    steps: int = 1000
    """Optimizer steps in the whole run. A run may be given more later: it goes on along the cosine of the new number."""
    batch_size: int = 8
    """Sequences per process and forward pass."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    final_rate: float = 0.1
    """Share of the peak at which the cosine ends."""
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
        if not 0 <= self.final_rate <= 1:
            raise ValueError(f"final_rate must be in [0, 1], a share of learning_rate: got {self.final_rate}")


@dataclass(frozen=True)
class TrainConfig:
    """Train a language model, or go on with a run that was interrupted."""

    output: Path
    """Folder of the run: checkpoints, TensorBoard logs, record.json and the final model."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    init: Path | None = None
    """Start a new run, from step 0, with the weights and the tokenizer of this one: the folder of a run, of one of its
    checkpoints, or of any saved causal language model of transformers. Options of the model are its own."""
    lift: bool = False
    """Make the linear mixers of --init log-linear first: the same model until it is trained."""
    train: Literal["all", "levels"] = "all"
    """levels: change only λ's parameters of the log-linear model of --init (or of --lift), and none of the others."""
    seed: int = 0
    """Of the initialisation and of the order of the data."""
    data_seed: int | None = None
    """Of the order of the data alone; none: seed."""
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
        if self.lift and self.init is None:
            raise ValueError("lift: needs --init, the linear model to start from")
        if self.train == "levels" and self.init is None:
            raise ValueError("train: levels needs --init, the model whose other parameters stay as they are")
        if self.save_every % self.log_every:
            # A logged loss is a mean since the last one: a checkpoint in between would change it after a restart.
            raise ValueError(f"save_every must be a multiple of log_every: got {self.save_every} and {self.log_every}")

    def options(self) -> dict:
        """All options but ``output``, flat and ready for JSON and YAML."""
        flat: dict = {}
        for name, value in dataclasses.asdict(self).items():
            flat.update(value if isinstance(value, dict) else {name: value})
        del flat["output"]
        return {name: _plain(value) for name, value in flat.items()}

    def arguments(self) -> dict:
        """Everything that decides the result: not where the run or the cache lies."""
        arguments = self.options()
        del arguments["cache"]
        for name, default in _ADDED.items():
            if arguments[name] == default:
                del arguments[name]
        return arguments


# Options that records of older runs lack, with the values that they stand for there.
_ADDED = {
    **{"streaming": False, "max_documents": None, "lift": False, "train": "all"},
    **{"level_scale_std": None, "final_rate": 0.1, "data_seed": None},
}


def _plain(value):
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
