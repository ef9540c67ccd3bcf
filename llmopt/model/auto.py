"""Which of transformers' Auto classes a model is built and loaded by."""
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

CAUSAL, SEEING, MANIFOLD = "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"


def auto_name(kind: str, architectures: Any) -> str:
    """The name of the Auto class that makes all of a model: a causal LM, or one that reads images or sound, too.

    kind, architectures: `model_type` and `architectures` of its config. Of some models that see (Llama 4, Qwen3.5)
    AutoModelForCausalLM makes the language part alone: that is meant where the config names it as its architecture.
    """
    part, whole = (names.get(kind) for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
                                                 MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES))
    if whole is None or whole == part or isinstance(architectures, list) and part in architectures:
        return CAUSAL
    return SEEING if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else MANIFOLD


def auto_class(config: Any) -> Any:
    """The Auto class that makes all of the model of a config."""
    return getattr(transformers, auto_name(config.model_type, getattr(config, "architectures", None)))
