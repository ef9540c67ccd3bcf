"""What can be wrong with the files of a model's folder, found before any weight is read: one clear line each."""
import json
import os
import struct
from pathlib import Path
from typing import Any

from llmopt.method import LlmoptError

MAX_HEADER = 100_000_000
COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
              "special_tokens_map.json")


def check_folder(folder: Path) -> None:
    """Raise LlmoptError for a folder that is no model: no config, a missing, truncated or foreign weight file."""
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise LlmoptError(f"{folder}: no config.json; this is " + (
            "an adapter: merge it into its model first (peft: merge_and_unload)" if adapter else "not a model folder"))
    for name in COMPANIONS:
        if (folder / name).is_file():
            _check_mapping(folder / name)
    for file in weight_files(folder):
        check_safetensors(file)


def _check_mapping(file: Path) -> None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LlmoptError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise LlmoptError(f"{file}: not a JSON mapping")


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors shards, in order; raises LlmoptError when one is missing or outside the folder."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise LlmoptError(f"{folder}: no model.safetensors{_other_format(folder)}")
        return [single]
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
        raise LlmoptError(f"{index}: not a safetensors index: {fact_of(error)}") from error
    for name in names:
        if os.sep in name or name.startswith("..") or not name.endswith(".safetensors"):
            raise LlmoptError(f"{index}: {name!r} is not a file of this folder")
        if not (folder / name).is_file():
            raise LlmoptError(f"{folder / name}: listed in the index and missing; fetch this shard again")
    return [folder / name for name in names]


def _other_format(folder: Path) -> str:
    """A hint about weights that are there, but in a format that is not read."""
    for file in sorted(folder.iterdir()):
        if file.suffix in (".bin", ".pt", ".pth"):
            return f"; {file.name} is pickled and may run code: convert it with save_pretrained"
        if file.suffix in (".gguf", ".onnx", ".h5", ".msgpack", ".safetensors"):
            return f"; {file.name} is not read: take the model's original safetensors"
    return ""


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
        entries = [(entry["shape"], entry["dtype"], entry["data_offsets"][1]) for name, entry in header.items()
                   if name != "__metadata__"]
        promised, actual = start + max((end for _, _, end in entries), default=0), file.stat().st_size
    except (KeyError, TypeError, IndexError) as error:
        raise LlmoptError(f"{file}: a tensor in the safetensors header lacks shape, dtype or data_offsets") from error
    if promised != actual:
        raise LlmoptError(f"{file}: header says {promised:,} bytes, the file has {actual:,}. "
                          "The download was cut off; fetch this shard again.")


def fact_of(error: Exception) -> str:
    """The first line of a message, with the next where it ends in a colon; a bare key says that it is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, KeyError):
        return f"unknown or missing key {lines[0]}"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
