"""What can be told of a model without reading a weight: its config, headers of its files, llmopt.json if it has one."""
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from llmopt.checkpoint.compressed_tensors import rounded_inputs, widths
from llmopt.checkpoint.facts import FILE, read_layers
from llmopt.errors import LlmoptError
from llmopt.files.checks import refusals
from llmopt.files.hub import check_name, companion
from llmopt.files.json_shapes import COUNT, check_shape
from llmopt.model import levels
from llmopt.model.abilities import abilities_of, abilities_of_experts
from llmopt.model.beside_text import carried
from llmopt.model.blocks import spec_of
from llmopt.model.loading import read_config, resolve
from llmopt.model.skeleton import skeleton
from llmopt.model.ways import view
from llmopt.model.ways.dequantized import advice
from llmopt.specs import ModelSpec

SHAPE = {"layers": "num_hidden_layers", "hidden size": "hidden_size", "query heads": "num_attention_heads",
         "KV heads": "num_key_value_heads", "head size": "head_dim", "feed-forward width": "intermediate_size",
         "vocabulary": "vocab_size", "context": "max_position_embeddings"}
PACKED = {"quantization_config": {"config_groups": {str: {"weights": {"num_bits": COUNT, str: object}, "targets": [str],
                                                          str: object}}, str: object}, str: object}


def checkpoint_folder(spec: ModelSpec) -> Path | None:
    """The folder with llmopt.json and config.json of what llmopt has written; None for any other model.

    Of a hub name these two files alone are fetched. Raises LlmoptError for a name that is not to be had.
    """
    source, revision = resolve(spec), spec.revision
    if Path(source).exists() or source.startswith((".", "/", "~")):
        return Path(source) if not Path(source).is_dir() or (Path(source) / FILE).exists() else None
    check_name(source, revision)
    file = companion(source, FILE, revision)
    return file.parent if file and companion(source, "config.json", revision) else None


def dense_facts(spec: ModelSpec) -> dict[str, Any]:
    """Shape, size and type of a model that llmopt did not write, and what of llmopt works on it.

    bytes: of the weight files in a folder; of a hub name, what its parameters take. Unknown figures are None.
    """
    source, config = read_config(spec)
    text, made_by = config.get_text_config(), _quantized(config)
    stored = str(config.dtype).removeprefix("torch.") if config.dtype else None     # before a model is made of it
    found = _of_skeleton(config, source)
    count = found["parameters"]
    size = getattr(torch, stored).itemsize if stored else None
    return {
        "model": spec.id, "architecture": config.model_type, "supported": found["level"] is not None,
        "level": found["level"],
        "shape": {word: value for word, key in SHAPE.items() if (value := _of_all_layers(text, key)) is not None},
        "parameters": count, "dtype": stored,
        "made_from": seen.told if (seen := view.of(source)) else [],
        "bytes": sum(file.stat().st_size for file in view.files(Path(source))) if Path(source).is_dir() else
        count * size if count and size and not made_by else None,
        "bits": made_by["bits"] if made_by else [8 * size] if size else [],
        "quantized_by": made_by["by"] if made_by else None,
        "compressed": found["compressed"], "carried": found["carried"],
        "works": {part: why or "yes" for part, why in found["works"].items()},
        "note": f"already quantized; {advice(made_by['by'])}" if made_by else found["refusal"],
    }


def _of_all_layers(config: Any, key: str) -> Any:
    """A figure of the config; None for one that it has not, or in which its layers differ."""
    try:
        return getattr(config, key, None)
    except RuntimeError:                # transformers' AmbiguousGlobalPerLayerAttributeError
        return None


def _of_skeleton(config: Any, source: str) -> dict[str, Any]:
    """What a model without weights tells.

    parameters: tied ones count once. level: the levels that hold. works: by part, why it does not. compressed: where
    the blocks lie of a model that reads more than text; carried: its other parts. refusal: why none of it works.
    """
    told = {"parameters": None, "level": None, "works": {}, "compressed": None, "carried": {}, "refusal": ""}
    try:
        with refusals(source):
            model = skeleton(config, torch.float32)
        told["parameters"] = model.num_parameters()
        works, level = abilities_of(model) | abilities_of_experts(model), levels.described(model)
        beside = carried(model)
        return told | {"works": works, "level": level, "carried": beside,
                       "compressed": spec_of(model).layers if beside else None}
    except LlmoptError as error:
        return told | {"refusal": str(error)}


def _quantized(config: Any) -> dict[str, Any] | None:
    """{"by": tool, "bits": [...]} of a model that another tool has quantized."""
    given = getattr(config, "quantization_config", None)
    if not given:
        return None
    known = given if isinstance(given, dict) else given.to_dict()
    groups = known.get("config_groups")
    weights = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else [known]
    found = {part.get("num_bits", part.get("bits")) for part in weights}
    return {"by": str(known.get("quant_method", "another tool")),
            "bits": sorted(bits for bits in found if isinstance(bits, int))}


def weight_bits(facts: dict[str, Any], config: dict[str, Any], where: str) -> dict[str, int]:
    """{bits: how many weights have them} of a checkpoint; the model's own type where nothing is quantized.

    Records tell of weights that were rounded and written dense, too; a model saved without a report has none.
    """
    found: dict[str, Any] = {}
    for record in facts.get("records", []):
        found |= {name: entry["bits"] for name, entry in record["meta"].get("modules", {}).items()}
    if not found and config.get("quantization_config"):
        check_shape(config, PACKED, where)
        found = widths(config["quantization_config"])
    if found:
        return {f"{bits:g}": count for bits, count in sorted(Counter(found.values()).items())}
    stored = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return {str(8 * stored.itemsize): 0} if isinstance(stored, torch.dtype) else {}


def _packing(packed: Any) -> str | None:
    """How a file holds the weights, by compressed-tensors' name, and whether their inputs are rounded."""
    if not isinstance(packed, dict):
        return None
    return "; ".join([str(packed.get("format")), *(f"inputs rounded: {how}" for how in rounded_inputs(packed))])


def checkpoint_facts(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """llmopt.json, and what config.json tells beside it: layers, bits, shapes by layer."""
    config = read_layers(folder)
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    return facts | {"layers": text.get("num_hidden_layers", text.get("n_layer")),
                    "packing": _packing(config.get("quantization_config")),
                    "bits": weight_bits(facts, config, str(folder / "config.json")),
                    "per_layer_config": config.get("per_layer_config", {})}
