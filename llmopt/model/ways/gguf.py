"""A GGUF file of llama.cpp as a Hugging Face model: its config, its tokenizer, and its tensors one by one.

transformers knows which of its models a file is, under which names the tensors go there, and what llama.cpp has done to
their values: q and k rows in another order, norms off by one, experts in two stacks. It has two readers, lists of
conversions for some architectures and processors of arrays for the others; each is asked for one tensor at a time,
when that is read, and gives what `from_pretrained(gguf_file=...)` gives.
"""
import copy
import json
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from llmopt.errors import LlmoptError, nearest
from llmopt.files.checks import MAX_COUNTED, read_json, refusals
from llmopt.files.gguf_head import Head, Stored
from llmopt.files.tensors import Made, Places

LOG = logging.getLogger(__name__)
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}        # values, not blocks of codes
NOT_WEIGHTS = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight")     # made from a config's settings
SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


def check(head: Head) -> None:
    """Raise LlmoptError for a file that transformers does not read, or whose weights cannot be made numbers again."""
    if (split := SPLIT.search(head.file.name)) and int(split[1]) > 1:
        raise LlmoptError(f"{head.file}: one of {int(split[1])} parts, and transformers reads whole files: put them "
                          "together by `llama-gguf-split --merge FIRST WHOLE`")
    known = _architectures()
    if _squashed(head.architecture) not in map(_squashed, known):
        raise LlmoptError(f"{head.file}: a GGUF file of the architecture {head.architecture[:80]!r}, which "
                          f"transformers {transformers.__version__} does not read"
                          f"{nearest(head.architecture, known)}. It reads {', '.join(known)}")
    count = head.facts.get(f"{head.architecture}.block_count", 0)
    if not isinstance(count, int) or count > min(MAX_COUNTED["layer"], len(head.tensors)):
        raise LlmoptError(f"{head.file}: block_count is {count}, and the file holds {len(head.tensors)} tensors")
    for kind in head.types():
        if not _is_readable(kind, head):
            tensor = next(tensor for tensor in head.tensors if tensor.type == kind)
            raise LlmoptError(f"{head.file}: {tensor.name} is of the type {tensor.type}, which cannot be dequantized "
                              "here; take a file of another type (Q8_0, Q4_K_M, ...), or the model's safetensors")


def write_companions(head: Head, folder: Path) -> None:
    """Write what lies beside a model's weights: config.json, generation_config.json, tokenizer and a card."""
    config = config_of(head)
    with refusals(f"{head.file}: the model cannot be made"):
        model = _empty(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if "tokenizer.ggml.tokens" in head.facts:
        _write_tokenizer(head, config, folder)
    else:
        LOG.warning("%s holds no tokenizer: texts cannot be read, and the result will have none", head.file)
    (folder / "README.md").write_text(_card(head), encoding="utf-8")


def config_of(head: Head) -> Any:
    """The config that transformers makes of the file's metadata; its type is that of the values in the file.

    Blocks of codes become float32, as transformers has it.
    """
    with refusals(f"{head.file}: transformers cannot make a config of its metadata"):
        config = transformers.AutoConfig.from_pretrained(head.file.parent, gguf_file=head.file.name)
    for of_the_file in ("quantization_config", "_model_name_or_path"):
        config.__dict__.pop(of_the_file, None)
    types = set(head.types())
    config.dtype = PLAIN[next(name for name in ("BF16", "F16", "F32") if name in types)] if types <= PLAIN.keys() else \
        torch.float32
    rows = next((tensor.shape[0] for tensor in head.tensors if tensor.name == "token_embd.weight"), None)
    if rows and "tokenizer.ggml.tokens" not in head.facts and f"{head.architecture}.vocab_size" not in head.facts:
        config.get_text_config().vocab_size = rows
    return config


def _write_tokenizer(head: Head, config: Any, folder: Path) -> None:
    with refusals(f"{head.file}: the tokenizer cannot be made"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(head.file.parent, gguf_file=head.file.name)
        tokenizer.model_max_length = getattr(config.get_text_config(), "max_position_embeddings",
                                             tokenizer.model_max_length)
        tokenizer.save_pretrained(folder)
    _leave_out_added(folder, head.facts["tokenizer.ggml.tokens"])


def _leave_out_added(folder: Path, count: int) -> None:
    """Take out the tokens that transformers adds behind the file's own: the model has no embeddings for them.

    Its byte-level tokenizers bring an <|endoftext|> of their own, which Llama-3's vocabulary has not.
    """
    content = read_json(folder / "tokenizer.json")
    late = {token["content"] for token in content["added_tokens"] if token["id"] >= count}
    if late:
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in late]
        settings = {key: value for key, value in read_json(folder / "tokenizer_config.json").items()
                    if not (isinstance(value, str) and value in late)}
        for name, data in (("tokenizer.json", content), ("tokenizer_config.json", settings)):
            (folder / name).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def _card(head: Head) -> str:
    """The facts at the head of a model card, as far as the file tells them."""
    import yaml

    base = head.facts.get("general.base_model.0.repo_url") or head.facts.get("general.source.huggingface.repository")
    known = {"license": head.facts.get("general.license"), "license_link": head.facts.get("general.license.link"),
             "license_name": head.facts.get("general.license.name"),
             "base_model": base and str(base).removeprefix("https://huggingface.co/")}
    return f"---\n{yaml.safe_dump({key: str(value) for key, value in known.items() if value})}---\n"


def places(head: Head, config: Any) -> Places:
    """The tensors of the model under transformers' names, each made of those of the file when it is read.

    config: of the model, as `config_of` has it. Tensors that transformers has no place for are said and left out.
    """
    with refusals(f"{head.file}: the model cannot be made"):
        model = _empty(config)
        named = (_converted if _converts(head) else _processed)(head, config, model)
    used = {stored.name for parts, _ in named.values() for stored in parts}
    if left := [stored.name for stored in head.tensors if stored.name not in used]:
        LOG.warning("%s: %s, which transformers does not read%s", head.file, ", ".join(left[:4]) +
                    (f" and {len(left) - 4} more tensors" if len(left) > 4 else ""),
                    "; positions beyond the original context may be off" if any(map(NOT_WEIGHTS.match, left)) else "")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found: Places = {}
    for name, (parts, make) in named.items():
        values = sum(int(np.prod(stored.shape)) for stored in parts)
        shape = shapes.get(name, ())
        found[name] = Made(tuple(shape) if shape and shape.numel() == values else parts[0].shape, config.dtype,
                           head.file, partial(_checked, make, head.file, name, config.dtype))
    return found


def _checked(make: Callable[[], Tensor], file: Path, name: str, dtype: torch.dtype) -> Tensor:
    with refusals(f"{file}: {name} cannot be made"):
        return make().to(dtype)


def _processed(head: Head, config: Any, model: nn.Module) -> dict[str, tuple[list[Stored], Callable[[], Tensor]]]:
    """By transformers' older reader: {name: (the tensors of the file, what makes one of them)}."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    processor = TENSOR_PROCESSORS.get(head.architecture, TensorProcessor)(config=config.to_dict())
    names = _names(head, config, model, processor)
    parts: dict[str, list[Stored]] = {}
    for stored in head.tensors:
        name = names.get(stored.name, names.get(stored.name.removesuffix(".weight")))
        if name is not None:
            parts.setdefault(name, []).append(stored)

    def make(name: str) -> Tensor:
        held: dict[str, dict[str, Tensor]] = {"tensors": {}}
        for stored in parts[name]:
            done = processor.process(weights=_numbers(head.file, stored), name=stored.name, tensor_key_mapping=names,
                                     parsed_parameters=held)
            if done.name in names:
                held["tensors"][name] = torch.from_numpy(np.ascontiguousarray(done.weights))
        return held["tensors"][name]

    return {name: (found, partial(make, name)) for name, found in parts.items()}


def _names(head: Head, config: Any, model: nn.Module, processor: Any) -> dict[str, str]:
    """{name in the file: name in the model}, as `get_gguf_hf_weights_map` of transformers has it.

    That makes the table of all of llama.cpp's names anew for each module, which takes minutes for a large model.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next((key for key, name in MODEL_ARCH_NAMES.items() if name == head.architecture), None)
    if kind is None:
        raise LlmoptError(f"the package gguf does not know the architecture {head.architecture!r}; is there a newer "
                          "one? pip install --upgrade gguf")
    known, found = get_tensor_name_map(kind, config.num_hidden_layers), {}
    paths = [name.split(".") for name in model.state_dict()]
    for depth in range(max(map(len, paths))):               # files may leave out the names of the outer modules
        for path in (path for path in paths if len(path) > depth):
            outer, inner = "".join(f"{part}." for part in path[:depth]), processor.preprocess_name(
                ".".join(path[depth:]))
            leaf = next((leaf for leaf in (".weight", ".bias") if inner.endswith(leaf)), "")
            named = known.get_name(inner.removesuffix(leaf))
            if named is not None:
                found.setdefault(named + leaf, outer + inner)
                continue
            more: dict[str, str] = {}
            processor.perform_fallback_tensor_mapping(more, leaf, outer, inner)
            found |= {key: value for key, value in more.items() if key not in found}
    return found


def _converted(head: Head, config: Any, model: nn.Module) -> dict[str, tuple[list[Stored], Callable[[], Tensor]]]:
    """By transformers' lists of conversions: the same."""
    from transformers.core_model_loading import WeightRenaming, rename_source_key
    from transformers.integrations.gguf import utils
    from transformers.integrations.gguf.reader import GgufHeader, TensorInfo

    numbers = _type_numbers()
    header = GgufHeader(str(head.file), head.architecture, tuple(
        TensorInfo(stored.name, stored.shape, numbers[stored.type], stored.start, stored.size)
        for stored in head.tensors), 0)
    mapping = utils.get_gguf_conversion_mapping(head.architecture, config)
    blocks = utils.get_gguf_plan(header, mapping)[0]
    loading = utils.add_gguf_load_ops(mapping, blocks, header, config.dtype)
    renamings = [entry for entry in loading if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in loading if not isinstance(entry, WeightRenaming)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    known, parts = model.state_dict().keys(), {}
    for stored in head.tensors:
        name, pattern = rename_source_key(stored.name, renamings, converters)
        if name in known:
            parts.setdefault(name, []).append((stored, pattern))

    def make(name: str) -> Tensor:
        converter = copy.deepcopy(by_pattern[parts[name][0][1]])
        for stored, pattern in parts[name]:
            converter.add_tensor(name, stored.name, pattern, _raw(head.file, stored))
        made = converter.convert(name)[name]
        return made[0] if isinstance(made, list) else made

    return {name: ([stored for stored, _ in found], partial(make, name)) for name, found in parts.items()}


def _mapped(file: Path, stored: Stored) -> np.ndarray:
    return np.memmap(file, mode="r", dtype=np.uint8, offset=stored.start, shape=(stored.size,))


def _numbers(file: Path, stored: Stored) -> np.ndarray:
    """The values of a tensor, float32, as the package gguf dequantizes them."""
    from gguf import GGMLQuantizationType, dequantize
    from gguf.quants import quant_shape_to_byte_shape

    kind, raw = GGMLQuantizationType[stored.type], _mapped(file, stored)
    if stored.type in ("F32", "F16"):
        return raw.view(np.float32 if stored.type == "F32" else np.float16).reshape(stored.shape).astype(np.float32)
    return dequantize(raw.reshape(quant_shape_to_byte_shape(stored.shape, kind)), kind).reshape(stored.shape)


def _raw(file: Path, stored: Stored) -> Tensor:
    """The values of a tensor as they lie in the file, or the bytes of its blocks [..., bytes of a row]."""
    raw = torch.from_numpy(np.array(_mapped(file, stored)))
    if stored.type in PLAIN:
        return raw.view(PLAIN[stored.type]).reshape(stored.shape)
    return raw.reshape(*stored.shape[:-1], -1)


def _empty(config: Any) -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def _converts(head: Head) -> bool:
    """True for an architecture that transformers reads by a list of conversions."""
    from transformers.integrations.gguf import GGUF_ARCHS

    return head.architecture in GGUF_ARCHS


def _architectures() -> list[str]:
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return sorted({*GGUF_CONFIG_ARCHS, *GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer", "t5", "umt5"})


def _is_readable(kind: str, head: Head) -> bool:
    return kind in PLAIN or (kind in _block_types() if _converts(head) else _dequantizes(kind))


def _squashed(name: str) -> str:
    """llama.cpp's names and transformers' differ in signs: qwen2moe and qwen2_moe."""
    return re.sub(r"[-_]", "", name)


def _block_types() -> set[str]:
    """The types whose blocks transformers' lists of conversions can take apart."""
    from transformers.integrations.gguf.dequant import GGML_NAME

    return set(GGML_NAME.values())


def _type_numbers() -> dict[str, int]:
    from gguf import GGMLQuantizationType

    return {kind.name: int(kind) for kind in GGMLQuantizationType}


def _dequantizes(kind: str) -> bool:
    """True for a type whose blocks the package gguf can take apart; tried on an empty one."""
    from gguf import GGMLQuantizationType, dequantize
    from gguf.constants import GGML_QUANT_SIZES

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]), np.uint8), GGMLQuantizationType[kind])
    except NotImplementedError:
        return False
    return True
