"""A checkpoint that another tool has quantized, read as the dense model that its codes and scales stand for.

    fp8                 W (e4m3, e5m2) * scale: of the tensor [], of a channel [out], of blocks [out / 128, in / 128]
    compressed-tensors  by its own decompressors, format by format: packed integers, int8, fp8, NVFP4, MXFP4, ...
    mxfp4               experts of gpt-oss: blocks [E, out, groups, 16] of two e2m1 numbers, scales [E, out, groups]

DeepSeek calls the factor weight_scale_inv, others weight_scale; both are multiplied by. Scales of inputs and of the KV
cache are left out: what the weights read is not rounded any more. Each weight is made when it is read.
"""
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmopt.errors import LlmoptError
from llmopt.files.checks import refusals
from llmopt.files.limited import limited
from llmopt.files.tensors import Made, Place, Places, file_of, outlines, read
from llmopt.model.expert_files import EXPERTS

FP8 = ("fp8", "fbgemm_fp8", "modelopt")             # quant_method in config.json, as tools write it
KNOWN = (*FP8, "compressed-tensors", "mxfp4")
SCALES = ("_scale_inv", "_scale")
INPUTS = re.compile(r"\.(input|output|activation|k|v|q|prob)_(global_)?(scale|zero_point)(_ub|_inv)?$"
                    r"|\.(up|gate_up|down)_proj_activation_scale$")
NUMBERS = {torch.float8_e4m3fn, torch.float8_e5m2}
INSTEAD = {"bitsandbytes": "; or let transformers write it dense: model.dequantize(), then save_pretrained"}


def method_of(config: dict[str, Any]) -> str | None:
    """The tool that a config.json says has quantized the model; None for a dense one."""
    given = config.get("quantization_config", config.get("compression_config"))
    return None if not given else str(given.get("quant_method", "compressed-tensors" if "config_groups" in given else
                                                "another tool")) if isinstance(given, dict) else "another tool"


def refuse_unknown(method: str, source: str) -> None:
    """Raise LlmoptError for codes that are not taken apart here, with what to do instead."""
    if method not in KNOWN:
        raise LlmoptError(f"{source}: quantized by {method}, whose numbers are not taken apart here "
                          f"({', '.join(KNOWN)} are): start from the dense checkpoint{INSTEAD.get(method, '')}")


def advice(method: str) -> str:
    """What to do with a quantized checkpoint that is to be compressed."""
    return "start from the dense checkpoint" + (
        ", or read it as a dense model by --dequantize (dequantize: true): what it has lost stays lost"
        if method in KNOWN else INSTEAD.get(method, ""))


def dense(found: Places, config: dict[str, Any], dtype: torch.dtype, source: str) -> Places:
    """The tensors of the dense model, as `dtype` where they were quantized; config: the quantization_config.

    Raises LlmoptError for codes without scales, scales without codes, shapes that do not fit, unknown formats.
    """
    method = method_of({"quantization_config": config})
    made = (_experts if method == "mxfp4" else _floats if method in FP8 else _compressed)(found, config, dtype, source)
    taken = {part for parts, *_ in made.values() for part in parts}
    left = {name: place for name, place in found.items() if name not in taken and not INPUTS.search(name)}
    for name, (shape, stored) in outlines(left).items():
        if stored is None or stored in NUMBERS or name.endswith((*SCALES, "_packed", "_zero_point", "_blocks")):
            raise LlmoptError(f"{source}: nothing in the files tells what {name} {list(shape)} belongs to; the "
                              f"checkpoint does not fit its quantization_config ({method})")
    return left | {name: Made(shape, dtype, file_of(found[parts[0]]), partial(_made, make, source, name, shape, dtype))
                   for name, (parts, shape, make) in made.items() if make}


Recipe = tuple[list[str], tuple[int, ...], Callable[[], Tensor] | None]      # names in the files, shape, what makes it


def _made(make: Callable[[], Tensor], source: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    with refusals(f"{source}: {name} cannot be dequantized"):
        tensor = make()
    if tuple(tensor.shape) != shape:
        raise LlmoptError(f"{source}: {name} becomes {list(tensor.shape)} where {list(shape)} was expected")
    return tensor.to(dtype)


def _floats(found: Places, config: dict[str, Any], dtype: torch.dtype, source: str) -> dict[str, Recipe]:
    known, made, block = outlines(found), {}, config.get("weight_block_size")
    for name, (shape, stored) in known.items():
        scale = next((name + end for end in SCALES if name + end in known), None)
        if scale is None or INPUTS.search(name):
            continue
        if stored not in NUMBERS:
            raise LlmoptError(f"{source}: {name} has scales and holds {stored}, not 8-bit floats; such codes are not "
                              "taken apart here: start from the dense checkpoint")
        size = _block(shape, known[scale][0], block)
        if size is None:
            raise LlmoptError(f"{source}: {scale} is {list(known[scale][0])}, which fits neither {name} "
                              f"{list(shape)} nor blocks of {block}")
        made[name] = [name, scale], tuple(shape), partial(_scaled, found[name], found[scale], size)
    return made


def _block(shape: tuple[int, ...], scales: tuple[int, ...], block: Any) -> tuple[int, int] | None:
    """Rows and columns of a weight [..., out, in] that share a scale; None where the scales do not fit."""
    rows, columns = shape[-2:] if len(shape) > 1 else (0, 0)
    lead = shape[:-2]
    if scales in ((), (1,), lead, (*lead, 1, 1)):
        return rows, columns
    if scales in ((*lead, rows), (*lead, rows, 1)):
        return 1, columns
    counts = scales[-2:]
    if scales[:-2] != lead or len(counts) != 2 or 0 in counts:
        return None
    size = tuple(block) if isinstance(block, (list, tuple)) and len(block) == 2 else (rows // counts[0],
                                                                                      columns // counts[1])
    fits = all(isinstance(n, int) and n > 0 for n in size) and counts == (-(-rows // size[0]), -(-columns // size[1]))
    return size if fits else None


def _scaled(weight: Place, scale: Place, block: tuple[int, int]) -> Tensor:
    """W * scale, float32; scales of one byte that are no floats are powers of two, 127 + the exponent."""
    numbers, scales = read({"weight": weight, "scale": scale}).values()
    scales = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
    numbers, lead = numbers.float(), numbers.shape[:-2]
    rows, columns = numbers.shape[-2:]
    scales = scales.reshape(*lead, -(-rows // block[0]), -(-columns // block[1])) if scales.numel() > 1 else scales
    if scales.numel() > 1:
        scales = scales.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    return numbers.mul_(scales)


def _experts(found: Places, config: dict[str, Any], dtype: torch.dtype, source: str) -> dict[str, Recipe]:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    known, made = outlines(found), {}
    for name, (shape, _) in known.items():
        stem = name.removesuffix("_blocks")
        if stem == name or f"{stem}_scales" not in known:
            continue
        scales = known[f"{stem}_scales"][0]
        if len(shape) != 4 or scales != shape[:3]:
            raise LlmoptError(f"{source}: {name} is {list(shape)} and {stem}_scales {list(scales)}; [experts, out, "
                              "groups, 16] and [experts, out, groups] expected")
        parts = {part: found[f"{stem}_{part}"] for part in ("blocks", "scales")}
        made[stem] = ([f"{stem}_blocks", f"{stem}_scales"], (shape[0], 2 * shape[2] * shape[3], shape[1]),
                      lambda parts=parts: convert_moe_packed_tensors(*read(parts).values(), dtype=dtype))
    return made


def _compressed(found: Places, config: dict[str, Any], dtype: torch.dtype, source: str) -> dict[str, Recipe]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    for key in ("sparsity_config", "transform_config"):
        if (config.get(key) or {}).get("format", "dense") != "dense" or (config.get(key) or {}).get("config_groups"):
            raise LlmoptError(f"{source}: its quantization_config has a {key}, which is not undone here; start from "
                              "the dense checkpoint")
    if isinstance(config.get("config_groups"), dict) and EXPERTS in config["config_groups"]:
        raise LlmoptError(f"{source}: its packed experts are not taken apart here; start from the dense checkpoint")
    with refusals(f"{source}: its quantization_config cannot be read"):
        known = {key: config[key] for key in QuantizationConfig.model_fields if key in config}
        settings = QuantizationConfig.model_validate(known)
    made, modules = {}, _by_module(found, source)
    targets = {group: list(scheme.targets) for group, scheme in settings.config_groups.items()}
    groups = limited(lambda: {stem: _group_of(stem, targets) for stem in modules},       # patterns of a stranger
                     f"{source}: the targets of its quantization_config", len(modules))
    for stem, parts in modules.items():
        if groups[stem] is None:
            raise LlmoptError(f"{source}: {stem} has scales, and no group of the quantization_config, or more than "
                              "one, tells what they mean")
        if not {"weight", "weight_packed"} & parts.keys():         # a head tied to an embedding: it reads its codes
            made[f"{stem}.weight"] = list(parts.values()), (), None
            continue
        scheme = settings.config_groups[groups[stem]]
        form = scheme.format or settings.format
        with refusals(f"{source}: the format of {stem}"):
            decompress = BaseCompressor.get_value_from_registry(getattr(form, "value", form)).decompress
        made[f"{stem}.weight"] = (list(parts.values()), _dense_shape(found, parts, scheme.weights.num_bits), partial(
            _decompressed, decompress, scheme, {leaf: found[name] for leaf, name in parts.items()}))
    return made


def _by_module(found: Places, source: str) -> dict[str, dict[str, str]]:
    """{module: {weight_packed, weight_scale, ...: name in the files}} of what is quantized."""
    modules: dict[str, dict[str, str]] = {}
    for name in found:
        if name.endswith((".weight_scale", ".weight_packed")):
            modules.setdefault(name.rpartition(".")[0], {})
    for name in found:
        stem, _, leaf = name.rpartition(".")
        if stem in modules and leaf.startswith("weight"):
            modules[stem][leaf] = name
    if odd := next((parts["weight_g_idx"] for parts in modules.values() if "weight_g_idx" in parts), None):
        raise LlmoptError(f"{source}: {odd}: groups of scattered columns (act order) are not taken apart here; start "
                          "from the dense checkpoint")
    return modules


def _group_of(stem: str, targets: dict[str, list[str]]) -> str | None:
    """The group of the config that a module belongs to: by its name, by a pattern, else by its class."""
    for group, names in targets.items():
        if any(name == stem or name.startswith("re:") and re.match(name[3:], stem) for name in names):
            return group
    by_class = [group for group, names in targets.items() if any(name[:1].isupper() for name in names)]
    return by_class[0] if len(by_class) == 1 else None


def _dense_shape(found: Places, parts: dict[str, str], bits: int) -> tuple[int, ...]:
    if "weight_shape" in parts:
        return tuple(read({"shape": found[parts["weight_shape"]]})["shape"].tolist())
    shape, stored = outlines({"it": found[parts.get("weight_packed", parts.get("weight"))]})["it"]
    if "weight_packed" not in parts:
        return shape
    return *shape[:-1], shape[-1] * 8 * (stored or torch.uint8).itemsize // bits


def _decompressed(decompress: Callable, scheme: Any, parts: Places) -> Tensor:
    return decompress(read(parts), scheme)["weight"]
