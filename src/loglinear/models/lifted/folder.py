"""FOLDER: a saved lifted model is lifted again while transformers loads it.

``config.json`` of a lifted model of transformers has two more fields. ``loglinear_levels`` holds the number of levels and the
name of the base. ``quantization_config`` names the method ``loglinear_levels``: transformers has one place where a folder can
name a method by which modules are exchanged between the construction of a model and the loading of its weights. Nothing is
quantised, and a loaded model does not count as quantised.

Without this package transformers says that it skips an unknown method, loads the base model, and lists the levels as
unexpected weights.
"""

from __future__ import annotations

from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from loglinear.models.levels import FIELD, level_parameters


@register_quantization_config(FIELD)
class LiftMethod(QuantizationConfigMixin):
    """The method that ``config.json`` names. All that it needs to know stands in ``loglinear_levels``."""

    def __init__(self, quant_method: str = FIELD) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]


@register_quantizer(FIELD)
class LiftWhileLoading(HfQuantizer):
    """Lifts the model between its construction, without memory, and the loading of its weights."""

    def preprocess_model(self, model: PreTrainedModel, dtype: Any = None, **kwargs: Any) -> None:
        from loglinear.models.lift import lift

        described = getattr(model.config, FIELD, None)
        if not isinstance(described, dict) or "num_levels" not in described:
            raise ValueError(
                f"config.json must have {FIELD} with num_levels, as a lifted model saves it: got {described}"
            )
        lift(model, described["num_levels"])
        setattr(model.config, FIELD, described)  # the base is the one of the first lift
        checkpoint_files = kwargs.get("checkpoint_files")
        if checkpoint_files is not None:
            held, needed = sum(map(_count, checkpoint_files)), len(level_parameters(model))
            if held != needed:
                raise ValueError(
                    f"{model.config.name_or_path} must hold the levels of its lifted model, {needed} tensors called "
                    f"level_scale: got {held}"
                )

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        del model.hf_quantizer  # nothing is quantised
        model.is_quantized = False  # type: ignore[assignment]
        name_method(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def name_method(model: PreTrainedModel) -> None:
    """Let the config of a lifted model name the method. A model that is quantised keeps the method that it has."""
    if not getattr(model, "is_quantized", False):
        model.config.quantization_config = LiftMethod()


def _count(path: str) -> int:
    """Tensors of levels in a file. transformers decides the part of their names before ``level_scale``."""
    with safe_open(path, framework="pt") as file:
        return sum(".level_scale." in f".{name}" for name in file.keys())  # noqa: SIM118 - not a dictionary
