"""What transformers' loader of packed checkpoints does more once llmopt is imported (from_pretrained.py)."""
import logging
import re
from types import ModuleType
from typing import Any

NEEDS = {"needs": "import llmopt"}          # in a group of a quantization_config: what has all others refuse it


def finish(model: Any, source: str) -> None:
    """See to a model that was loaded quantized: it can be saved again, and stays packed where that is asked for."""
    _forget_companions(model)
    _stay_packed(model, source)
    _keep_codes(model)


def _stay_packed(model: Any, source: str) -> None:
    """Leave weights packed where that is asked for."""
    from llmopt.model.stay_packed import asked_for, keep_packed

    if asked_for() and model.hf_quantizer.quantization_config.quant_method == "compressed-tensors":
        keep_packed(model, source)


def extend_quantizer(quantizers: ModuleType) -> None:
    """Let packed weights be loaded that transformers would unpack at once, and experts without a false alarm."""
    from llmopt.model import stay_packed

    stay_packed.extend_quantizer(quantizers)
    _load_single_experts(quantizers.CompressedTensorsHfQuantizer)
    logging.getLogger("compressed_tensors.utils.match").addFilter(_is_news)


def _load_single_experts(quantizer: type) -> None:
    """Let packed experts be put together of which transformers knows no single matrices."""
    conversions = quantizer.update_weight_conversions

    def updated(self: Any, weight_conversions: list, model: Any) -> list:
        from llmopt.model.expert_loading import conversions as more

        return conversions(self, [*weight_conversions, *more(self, model)], model)

    quantizer.update_weight_conversions = updated


def extend_config(configs: ModuleType) -> None:
    """Let a checkpoint be loaded that says it needs llmopt: compressed-tensors refuses words that it does not know."""
    start = configs.CompressedTensorsConfig.__init__

    def started(self: Any, config_groups: Any = None, *args: Any, **kwargs: Any) -> None:
        if isinstance(config_groups, dict):
            config_groups = {name: {key: value for key, value in group.items() if {key: value} != NEEDS}
                             if isinstance(group, dict) else group for name, group in config_groups.items()}
        start(self, config_groups, *args, **kwargs)

    configs.CompressedTensorsConfig.__init__ = started


def _is_news(record: logging.LogRecord) -> bool:
    """False for the warning that packed experts match no module, as they are put into one when their weights come."""
    return not re.search(r"Could not match `re:.*\\\.experts\\\.", record.getMessage())


def _keep_codes(model: Any) -> None:
    """Let save_pretrained of a model that was loaded packed write it packed, as AutoModelForCausalLM's does."""
    from llmopt.model.loaded import is_ours
    from llmopt.model.modeling import let_save

    if model.get_output_embeddings() is not None and is_ours(model):
        let_save(model)


def _forget_companions(model: Any) -> None:
    """Let a model be saved whose experts were packed: transformers would part each stack by what lay in the files."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter
    from transformers.integrations.compressed_tensors import CompressedTensorsDequantize

    merged = [entry for entry in getattr(model, "_weight_conversions", None) or () if isinstance(entry, WeightConverter)
              and len(entry.operations) > 1 and isinstance(entry.operations[0], CompressedTensorsDequantize)]
    if merged:
        model._weight_conversions = [entry for entry in get_model_conversion_mapping(model, add_legacy=False)
                                     if not isinstance(entry, PrefixChange)]
