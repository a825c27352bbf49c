"""LIFT: a pretrained linear model becomes a log-linear one, and says the same until it is trained.

A model of this package gets its ``LevelScale``s by its config. In a model of transformers each linear mixer that
``lifted.kinds`` knows gives its place and its parameters to one of our mixers (``lifted.mixer``).

Where λ is 1 on every level a log-linear mixer is its linear mixer. So every linear mixer gets a ``LevelScale`` that starts at 1
and whose projection starts at 0: the outputs are the same, and the first gradient reaches the projection.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from loglinear import fenwick
from loglinear.layers import LevelScale
from loglinear.layers.table import LIFTED
from loglinear.models.configuration import LogLinearConfig
from loglinear.models.levels import FIELD, Trained, check_trained, describe_base, train_only
from loglinear.models.lifted.folder import name_method
from loglinear.models.lifted.kinds import KINDS, is_attention, kind_of
from loglinear.models.lifted.mixer import LiftedMixer
from loglinear.models.lifted.plans import Plans

DEFAULT_LEVELS = 15  # of a model without a longest context: the mixers' own default, 16,384 tokens


@dataclass
class LiftReport:
    """A report on the changes that ``lift`` has made to a model.

    Attributes:
        lifted: names of the mixers that are log-linear now. num_levels: levels with a λ of their own, in each of them.
        added: parameters that came with them. before: parameters of the model until then.
        left: names of the mixers that are as they were, and why.
    """

    lifted: list[str] = field(default_factory=list)
    added: int = 0
    before: int = 0
    left: dict[str, str] = field(default_factory=dict)
    num_levels: int = 0

    def __str__(self) -> str:
        share = self.added / max(self.before, 1)
        text = f"{len(self.lifted)} layers lifted, {self.added:,} parameters added ({share:.2%} of {self.before:,})"
        return "; ".join([text, *(f"{name} left: {reason}" for name, reason in self.left.items())])


def lift(model: nn.Module, num_levels: int | None = None, train: Trained = "all") -> LiftReport:
    """Turn the linear mixers of ``model`` into their log-linear forms, in place. Its outputs stay what they are.

    Args:
        model: a ``LogLinearForCausalLM`` or ``LogLinearModel``, or a model of transformers with linear mixers of the classes
            in ``loglinear.models.lifted.kinds.KINDS``. Every other module stays as it is, and so does every parameter.
        num_levels: levels with a λ of their own. None covers the config's ``max_position_embeddings``, and 16,384 tokens
            (15 levels) for a config without it, as Mamba-2's. In a model of ours the config's field follows.
        train: what an optimizer may change then: "all", what it might before and the levels, or "levels", the new parameters
            alone; all others are frozen.

    Raises:
        TypeError, ValueError: the model has no linear mixer, or one that our mixers cannot stand in for; the message names
            the module and the property. The model is then as it was.
    """
    if num_levels is not None and num_levels < 1:
        raise ValueError(f"num_levels must be at least 1: got {num_levels}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module: got {type(model).__name__}")
    check_trained(train)
    config = getattr(model, "config", None)
    if isinstance(config, LogLinearConfig):
        report = _lift_own(model, config, num_levels)
    else:
        report = _lift_foreign(model, _levels_of(config) if num_levels is None else num_levels)
    if isinstance(config, PreTrainedConfig):
        setattr(config, FIELD, describe_base(config, report.num_levels))
    if isinstance(model, PreTrainedModel) and not isinstance(config, LogLinearConfig):
        name_method(model)
    train_only(model, train)
    return report


def _lift_foreign(model: nn.Module, num_levels: int) -> LiftReport:
    """``lift`` for a model of another package."""
    before = sum(parameter.numel() for parameter in model.parameters())
    report = LiftReport(before=before, num_levels=num_levels)
    lifted = _lifted_forms(model, num_levels, report.left)
    if not lifted:
        others = "; ".join(f"{path}: {reason}" for path, reason in report.left.items()) or "no mixer"
        raise ValueError(
            f"model must have a linear mixer, one of {list(KINDS)}: got {type(model).__name__} with {others}"
        )
    for path, mixer in lifted.items():
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = mixer
    report.lifted = list(lifted)
    scales = [mixer.level_scale for mixer in set(lifted.values()) if mixer.level_scale is not None]
    report.added = sum(parameter.numel() for scale in scales for parameter in scale.parameters())
    return report


def _lifted_forms(model: nn.Module, num_levels: int, left: dict[str, str]) -> dict[str, LiftedMixer]:
    """The log-linear form of each linear mixer by path; ``left`` takes the others. The model stays as it is.

    Raises ValueError for a mixer that cannot be lifted.
    """
    forms: dict[str, LiftedMixer] = {}
    made: dict[nn.Module, LiftedMixer] = {}  # a module may stand at several places
    plans = Plans()
    for path, module in model.named_modules(remove_duplicate=False):
        if any(path.startswith(f"{place}.") for place in (*forms, *left)):
            continue
        if isinstance(module, LiftedMixer):
            left[path] = "log-linear already"
            continue
        try:
            kind = kind_of(module)
            if kind is not None and not path:
                raise ValueError("model must hold mixers: got a mixer itself")
            if kind is not None:
                forms[path] = made[module] = made.get(module) or kind.of(module, num_levels, plans)
        except ValueError as error:
            raise ValueError(f"{path or 'model'} ({type(module).__name__}) cannot be lifted: {error}") from error
        if path not in forms and is_attention(module):
            left[path] = f"{type(module).__name__} is no linear mixer"
    return forms


def _levels_of(config: object) -> int:
    """Levels that cover the longest context of a config of transformers."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config  # of a model that sees images too
    longest = getattr(text, "max_position_embeddings", None)
    return DEFAULT_LEVELS if longest is None else fenwick.num_levels(longest)


def _lift_own(model: nn.Module, config: LogLinearConfig, num_levels: int | None) -> LiftReport:
    """``lift`` for a model of this package."""
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
    before = sum(parameter.numel() for parameter in model.parameters())
    report = LiftReport(before=before, num_levels=levels)
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
    return report


def _mixers(model: nn.Module) -> dict[str, nn.Module]:
    """The mixers of all layers by name, in order."""
    return {name: module for name, module in model.named_modules() if name.endswith(".mixer")}


def _level_scale(mixer: nn.Module, hidden_size: int, num_levels: int) -> LevelScale:
    """λ of a mixer, 1 on every level whatever comes in, where the mixer's weights are."""
    like = mixer.get_parameter("out_proj.weight")
    level_scale = LevelScale(hidden_size, mixer.num_heads, num_levels, start="one")  # type: ignore[arg-type]
    nn.init.zeros_(level_scale.dl_proj.weight)
    return level_scale.to(like.device, like.dtype).train(mixer.training)
