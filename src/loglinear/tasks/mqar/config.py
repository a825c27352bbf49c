"""The models of an associative-recall run: the grid, cut into cells. Nothing heavy is imported: the command line builds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Literal

from loglinear.fenwick import num_levels

# Name in tables to mixer of LogLinearConfig, in the order of the tables.
MODELS = {
    "Transformer": "attention",
    "Mamba-2": "mamba2",
    "Log-Linear Mamba-2": "log_linear_mamba2",
    "Gated DeltaNet": "gated_deltanet",
    "Log-Linear Gated DeltaNet": "log_linear_gated_deltanet",
    "GLA": "gla",
    "Log-Linear GLA": "log_linear_gla",
    "KDA": "kda",
    "Log-Linear KDA": "log_linear_kda",
}
FIRST_FIVE = tuple(MODELS)[:5]  # those of the paper, of the full preset and of the committed pages
VALUE_DIM = 32  # V of every recurrent model; the values of all width/16 heads are twice the width, as in Mamba-2


@dataclass(frozen=True)
class Recipe:
    """The options that every cell of a run has in common."""

    steps: int
    """Optimizer steps of each model. Every step has new sequences."""
    batch_tokens: int
    """Tokens of a step, whatever the length of the sequences."""
    vocab_size: int
    """Half of it keys, half of it values."""
    layers: int
    """Blocks of each model."""
    mlp: int
    """Inner width of the MLPs, in widths of the model; 0 leaves them out."""
    warmup: float
    """Share of the steps in which the learning rate rises; then it falls to zero along a cosine."""
    weight_decay: float
    """Of matrices; norms, biases and gates do not decay."""
    held_out: int
    """Sequences for each number of pairs that choose the learning rate. The table comes from as many other sequences."""
    equal_shares: bool = False
    """Whether each number of pairs has the same share in the loss. Otherwise each answer has the same share, and many pairs
    outweigh few pairs."""
    tied: bool = False
    """Whether the output layer is the embedding, as in Zoology's models: what reads a value then serves all values."""
    output_scale: float = 0.1
    """Factor on the initial output projections, so that the output of a layer starts small beside the embeddings. Otherwise
    normalised layers drown the embeddings, and Gated DeltaNet stays at chance (docs/lab-notes.md)."""
    initial_decay: float = 1.0
    """Factor on the initial decay rates of recurrent models: as published, a head may forget within ten tokens."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: under autocast; weights, gates, norms, logits and the loss stay float32."""


@dataclass(frozen=True)
class Cell:
    """One model to train: the unit of work, and of resuming."""

    model: str
    width: int
    state_size: int
    length: int
    pairs: tuple[int, ...]
    learning_rate: float
    seed: int
    recipe: Recipe
    kind: str = "first"
    """Of the sequences: a name in ``kinds.KINDS``."""
    level_scale_start: str = "noise"
    """Where λ starts: "noise" is the projection of ``initializer_range``, as wide as all others; "paper" and "one" are those of
    ``LevelScale``, with its narrow projection."""

    @property
    def batch_size(self) -> int:
        """Sequences per step, which must be a multiple of the numbers of pairs."""
        return self.recipe.batch_tokens // self.length

    @property
    def heads(self) -> int:
        """H of a recurrent model."""
        return max(1, self.width // 16)

    @property
    def state_floats(self) -> int | None:
        """Most numbers that a layer of a recurrent model keeps of one sequence; None for the Transformer."""
        if self.model == "Transformer":
            return None
        # A token sees at most one state for each level.
        states = num_levels(self.length) if self.model.startswith("Log-Linear") else 1
        return states * self.heads * self.state_size * VALUE_DIM

    def identity(self) -> dict:
        """The cell as JSON gives it back. The last two fields are left out at their defaults, as in rows before them."""
        added = {f.name: f.default for f in fields(self)[-2:]}
        named = {name: value for name, value in asdict(self).items() if added.get(name) != value}
        return {**named, "pairs": list(self.pairs)}


@dataclass(frozen=True)
class Grid:
    """All combinations of the lists. Each learning rate is tried with the first seed; the best one gets all seeds."""

    models: tuple[str, ...]
    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    pairs: tuple[int, ...]
    """Numbers of pairs for the first length; longer sequences have more in proportion."""
    state_size: int
    """K: width of the keys of the recurrent models."""
    matched_state: bool
    """Whether linear models are trained a second time, with keys so much wider that their one state is as large as all states
    of their log-linear twin together."""
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    recipe: Recipe

    def sweeps(self) -> Iterator[list[Cell]]:
        """For each model at each size, the cells with the first seed that decide its learning rate."""
        for width, length, model in product(self.widths, self.lengths, self.models):
            pairs = tuple(count * length // self.lengths[0] for count in self.pairs)
            state_sizes = [self.state_size]
            if self.matched_state and f"Log-Linear {model}" in MODELS:
                state_sizes.append(self.state_size * num_levels(length))
            for state_size in state_sizes:
                yield [
                    Cell(model, width, state_size, length, pairs, rate, self.seeds[0], self.recipe)
                    for rate in self.learning_rates
                ]


PRESETS = {
    # 36 models of 8 to 25 s each: about five minutes on two cores. The pairs are the first half of a sequence, so that every
    # query has all of them in one bucket, and what comes after them in others. Seeds differ a lot: docs/lab-notes.md.
    # The setting was chosen with seeds 20 and 21.
    "small": Grid(
        models=("Mamba-2", "Log-Linear Mamba-2"),
        widths=(32,),
        lengths=(64,),
        pairs=(16,),
        state_size=8,
        matched_state=True,
        learning_rates=(0.005, 0.01, 0.02),
        seeds=tuple(range(10)),
        recipe=Recipe(
            steps=500,
            batch_tokens=2048,
            vocab_size=64,
            layers=1,
            mlp=0,
            warmup=0.1,
            weight_decay=0.0,
            held_out=256,
            equal_shares=True,
            tied=True,
            initial_decay=0.05,
        ),
    ),
    # One GPU; experiments/runs/mqar.sh says how long.
    "full": Grid(
        models=FIRST_FIVE,
        widths=(16, 32, 64),
        lengths=(256, 512),
        pairs=(4, 8, 16, 32, 64),
        state_size=16,
        matched_state=False,
        learning_rates=(2e-3, 5e-3, 1e-2, 2e-2),
        seeds=(0, 1, 2),
        recipe=Recipe(
            steps=4000,
            batch_tokens=40_960,
            vocab_size=2048,
            layers=2,
            mlp=0,
            warmup=0.1,
            weight_decay=0.1,
            held_out=512,
            equal_shares=True,
            tied=True,
            initial_decay=0.05,
            precision="bfloat16",
        ),
    ),
}
