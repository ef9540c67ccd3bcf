"""Loading the dense model, after a look at its files that turns damage into one clear line."""
import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmopt.method import LlmoptError, nearest
from llmopt.recipe import ModelSpec

REFERENCE = "llmopt/reference"
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
         "F8_E4M3": 1, "F8_E5M2": 1}
MAX_HEADER = 100_000_000


def resolve(name: str) -> str:
    """The folder or hub name behind a model id; `llmopt/reference` is the embedded model."""
    if name == REFERENCE:
        from llmopt_evals import world

        return str(world.reference_path())
    return name


def load_dense(spec: ModelSpec, trust_remote_code: bool = False) -> tuple[nn.Module, Any]:
    """(model in eval mode, tokenizer or None); raises LlmoptError for anything missing, truncated or not finite."""
    source = resolve(spec.id)
    if Path(source).is_dir():
        check_folder(Path(source))
    elif Path(source).exists() or source.startswith((".", "/", "~")):
        raise LlmoptError(f"{source}: not a model folder")
    trust = trust_remote_code or spec.trust_remote_code
    model, tokenizer = _from_pretrained(source, spec, trust), load_tokenizer(source, spec.revision, trust)
    check_finite(model, source)
    if tokenizer is not None and len(tokenizer) > 0:
        _check_vocabulary(model, tokenizer, source)
    return model.eval(), tokenizer


def _from_pretrained(source: str, spec: ModelSpec, trust: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, spec.dtype) if spec.dtype else "auto"
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, revision=spec.revision or "main", trust_remote_code=trust, output_loading_info=True)
        model = model.to(spec.device)
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()
        why = first[0] if first else type(error).__name__
        raise LlmoptError(f"{source}: the model cannot be loaded: {why}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            raise LlmoptError(f"{source}: {len(info[kind])} tensors {kind.split('_')[0]}, "
                              f"such as {sorted(map(str, info[kind]))[0]}; the checkpoint does not fit its config")
    return model


def load_tokenizer(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside the model, or None where there is none."""
    from transformers import AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not any((folder / f).exists() for f in
                                   ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LlmoptError(f"{source}: the tokenizer cannot be loaded: {str(error).splitlines()[0]}") from error


def _check_vocabulary(model: nn.Module, tokenizer: Any, source: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise LlmoptError(f"{source}: the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows; "
                          "they belong to different models")


def check_finite(model: nn.Module, source: str) -> None:
    """Raise LlmoptError naming the first tensor that holds NaN or Inf."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise LlmoptError(f"{source}: tensor {name} holds {bad} NaN or Inf values; the weights are damaged")


def check_folder(folder: Path) -> None:
    """Raise LlmoptError for a folder that is no model: no config, a missing, truncated or foreign weight file."""
    config = folder / "config.json"
    if not config.is_file():
        raise LlmoptError(f"{folder}: no config.json; this is not a model folder")
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise LlmoptError(f"{config}: not a JSON mapping: {error}") from error
    _check_known(kind, config)
    for file in weight_files(folder):
        check_safetensors(file)


def _check_known(kind: Any, config: Path) -> None:
    from llmopt.blocks import SPECS

    if kind not in SPECS:
        raise LlmoptError(f"{config}: architecture {kind!r} is not supported{nearest(str(kind), SPECS)}")


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors shards, in order; raises LlmoptError when one is missing or outside the folder."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            pickled = sorted(p.name for p in folder.glob("*.bin"))
            hint = f"; {pickled[0]} is pickled and may run code: convert it with save_pretrained" if pickled else ""
            raise LlmoptError(f"{folder}: no model.safetensors{hint}")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise LlmoptError(f"{index}: not a safetensors index: {error}") from error
    for name in names:
        if os.sep in name or name.startswith("..") or not name.endswith(".safetensors"):
            raise LlmoptError(f"{index}: {name!r} is not a file of this folder")
        if not (folder / name).is_file():
            raise LlmoptError(f"{folder / name}: listed in the index and missing; fetch this shard again")
    return [folder / name for name in names]


def read_header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: name -> {dtype, shape, data_offsets}."""
    with file.open("rb") as stream:
        start = stream.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= size <= MAX_HEADER or size + 8 > file.stat().st_size:
            raise LlmoptError(f"{file}: not a safetensors file (its header claims {size:,} bytes, the file has "
                              f"{file.stat().st_size:,})")
        try:
            header = json.loads(stream.read(size))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise LlmoptError(f"{file}: its safetensors header is not JSON") from error
    if not isinstance(header, dict):
        raise LlmoptError(f"{file}: its safetensors header is not a mapping")
    return header | {"__size__": size}


def check_safetensors(file: Path) -> None:
    """Raise LlmoptError if the file's length is not what its header promises."""
    header = read_header(file)
    start = header.pop("__size__") + 8
    try:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        promised, actual = start + max(ends, default=0), file.stat().st_size
    except (KeyError, TypeError, IndexError) as error:
        raise LlmoptError(f"{file}: a tensor in the safetensors header has no data_offsets") from error
    if promised != actual:
        raise LlmoptError(f"{file}: header says {promised:,} bytes, the file has {actual:,}. "
                          "The download was cut off; fetch this shard again.")
