"""LIFT: a pretrained linear model becomes a log-linear one, and says the same until it is trained.

Where λ is 1 on every level a log-linear mixer is its linear mixer. So every linear mixer gets a ``LevelScale`` that starts at 1
and whose projection starts at 0: the outputs are the same, and the first gradient reaches the projection.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from loglinear.layers import LevelScale
from loglinear.models.configuration import LIFTED, LogLinearConfig
from loglinear.models.levels import FIELD, Trained, check_trained, describe_base, train_only


@dataclass
class LiftReport:
    """A report on the changes that ``lift`` has made to a model.

    Attributes:
        lifted: names of the mixers that are log-linear now.
        added: parameters that came with them. before: parameters of the model until then.
        left: names of the mixers that are as they were, and why.
    """

    lifted: list[str] = field(default_factory=list)
    added: int = 0
    before: int = 0
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        share = self.added / max(self.before, 1)
        text = f"{len(self.lifted)} layers lifted, {self.added:,} parameters added ({share:.2%} of {self.before:,})"
        return "; ".join([text, *(f"{name} left: {reason}" for name, reason in self.left.items())])


def lift(model: PreTrainedModel, num_levels: int | None = None, train: Trained = "all") -> LiftReport:
    """Turn the linear mixers of ``model`` into their log-linear forms, in place. Its outputs stay what they are.

    Args:
        model: a ``LogLinearForCausalLM`` or ``LogLinearModel`` with linear mixers. Softmax attention stays as it is.
        num_levels: levels with a λ of their own; the config's ``max_position_embeddings`` becomes the longest context that
            they cover. None keeps that of the config.
        train: what an optimizer may change then: "all", what it might before and the levels, or "levels", the new parameters
            alone; all others are frozen.

    Raises:
        TypeError, ValueError: the model is of another kind or has no linear mixer. It is then as it was.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, LogLinearConfig):
        raise TypeError(f"model must be one of LogLinearConfig: got {type(model).__name__}")
    if num_levels is not None and num_levels < 1:
        raise ValueError(f"num_levels must be at least 1: got {num_levels}")
    check_trained(train)
    names = config.layer_mixers
    if not any(name in LIFTED for name in names):
        raise ValueError(f"model must have a linear mixer, one of {list(LIFTED)}: got {sorted(set(names))}")
    if any(name in LIFTED.values() for name in names) and config.level_scale_start != "one":
        raise ValueError(
            "model must have λ that start at 1 where it is log-linear already: got level_scale_start='paper'"
        )
    levels = config.num_levels if num_levels is None else num_levels
    if any(name in LIFTED.values() for name in names) and levels != config.num_levels:
        raise ValueError(
            f"num_levels must be {config.num_levels} or None, as the log-linear layers of the model have it: got {levels}"
        )
    report = LiftReport(before=model.num_parameters())
    for name, (path, mixer) in zip(names, _mixers(model).items(), strict=True):
        if name not in LIFTED:
            report.left[path] = "log-linear already" if name in LIFTED.values() else f"{name} is no linear mixer"
            continue
        mixer.level_scale = _level_scale(mixer, config.hidden_size, levels)
        for behind in ("norm", "out_proj"):  # as in a log-linear mixer: saved optimizers know parameters by their order
            mixer._modules[behind] = mixer._modules.pop(behind)
        report.lifted.append(path)
        report.added += sum(parameter.numel() for parameter in mixer.level_scale.parameters())
    mixers = [LIFTED.get(name, name) for name in names]
    config.mixer = mixers[0] if len(set(mixers)) == 1 else mixers
    config.level_scale_start = "one"
    if num_levels is not None:
        config.max_position_embeddings = 1 << (num_levels - 1)
    setattr(config, FIELD, describe_base(config, levels))
    train_only(model, train)
    return report


def _mixers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The mixers of all layers by name, in order."""
    return {name: module for name, module in model.named_modules() if name.endswith(".mixer")}


def _level_scale(mixer: nn.Module, hidden_size: int, num_levels: int) -> LevelScale:
    """λ of a mixer, 1 on every level whatever comes in, where the mixer's weights are."""
    like = mixer.get_parameter("out_proj.weight")
    level_scale = LevelScale(hidden_size, mixer.num_heads, num_levels, start="one")  # type: ignore[arg-type]
    nn.init.zeros_(level_scale.dl_proj.weight)
    return level_scale.to(like.device, like.dtype).train(mixer.training)
