"""FOLDER: what vLLM says of a lifted model's folder when it is not told to use our class."""

from typing import Any

from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from loglinear.models.levels import FIELD

OPTION = '--hf-overrides \'{"architectures": ["LiftedForCausalLM"], "quantization_config": null}\''


@register_quantization_config(FIELD)
class LiftedFolder(QuantizationConfig):
    """The method that ``config.json`` of a lifted model names. vLLM's own class for the base has no place for the levels."""

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict[str, Any], user_quant: Any, hf_config: Any = None) -> None:
        """Raise ValueError for the folder of a lifted model; vLLM asks every method about every folder."""
        if hf_quant_cfg.get("quant_method") == FIELD:
            raise ValueError(f"a lifted model of transformers needs the option {OPTION} on vLLM: got none")
