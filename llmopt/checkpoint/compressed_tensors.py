"""Quantized modules as compressed-tensors `pack-quantized` tensors and their quantization_config.

What is written loads in stock transformers, bit-exact: symmetric grids, 2 to 8 bits, mixed, in groups or per channel,
with the exact name of every module as a target.
"""
from torch import Tensor, nn

from llmopt.model.stored import packed, refuse_unportable
from llmopt.model.weights import check_consistent, coded

Exported = tuple[dict[str, dict[str, Tensor]], dict]


def export(model: nn.Module) -> Exported | None:
    """({state-dict key: tensors written in its place}, quantization_config); None when nothing is quantized.

    Raises LlmoptError for what compressed-tensors cannot hold, or where codes and dense weights disagree.
    """
    found = coded(model)
    if not found:
        return None
    refuse_unportable(model)
    check_consistent(model)
    return {weight.key: packed(weight) for weight in found}, quantization_config(model)


def widths(config: dict) -> dict[str, int]:
    """The bits of every module that a quantization_config of ours names."""
    return {name: group["weights"]["num_bits"] for group in config["config_groups"].values()
            for name in group["targets"]}


def quantization_config(model: nn.Module) -> dict:
    """The quantization_config of config.json: one group for each (bits, group size), exact names as targets."""
    found = coded(model)
    schemes: dict[tuple[int, int], list[str]] = {}
    for weight in found:
        schemes.setdefault((weight.codes.bits, weight.codes.group_size), []).append(weight.path)
    packed = {weight.path for weight in found}
    dense = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in packed and n != "lm_head"]
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "ignore": ["lm_head", *dense],
            "config_groups": {f"group_{i}": _scheme(bits, size, names)
                              for i, ((bits, size), names) in enumerate(sorted(schemes.items()))}}


def _scheme(bits: int, group_size: int, names: list[str]) -> dict:
    grouping = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    return {"targets": names, "input_activations": None, "output_activations": None,
            "weights": {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **grouping}}
