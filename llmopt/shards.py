"""Writing safetensors: shards close at block boundaries, files are synced, sizes are known before they are written."""
import json
import os
import re
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from llmopt.method import LlmoptError

METADATA = {"format": "pt"}
UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
DTYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
          "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
          "torch.bool": "BOOL"}


def size_of(text: str) -> int:
    """Bytes in "2GB", "500 MiB", ..."""
    number, unit = re.fullmatch(r"([\d.]+)\s*(\w+)", text).groups()
    return int(float(number) * UNITS[unit])


def tensor_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of the values alone; meta tensors count too."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def file_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of one safetensors file that holds `tensors`: values and header; works on meta tensors."""
    header, offset = {"__metadata__": METADATA}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-length // 8) * 8 + offset


def split(tensors: dict[str, Tensor], max_shard_size: int) -> list[dict[str, Tensor]]:
    """Shards of at most `max_shard_size` bytes that never cut a decoder layer, unless one layer alone is larger."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        block = re.match(r".*?\.(?:layers|h)\.\d+(?=\.)", name)
        groups.setdefault(block.group() if block else name, {})[name] = tensor
    shards: list[dict[str, Tensor]] = [{}]
    for group in groups.values():
        if shards[-1] and tensor_bytes(shards[-1]) + tensor_bytes(group) > max_shard_size:
            shards.append({})
        shards[-1].update(group)
    return shards


def write(folder: Path, tensors: dict[str, Tensor], max_shard_size: str) -> None:
    """Write model.safetensors, or numbered shards and their index, into `folder`."""
    shards = split(tensors, size_of(max_shard_size))
    if len(shards) == 1:
        _save(shards[0], folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": tensor_bytes(tensors)}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    file.touch()
    mode = file.stat().st_mode              # what the user's umask gives; safetensors would make it private
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file, metadata=METADATA)
    file.chmod(mode)


def sync(folder: Path) -> None:
    """Force every file of `folder`, and the folder itself, to the disk."""
    for path in [*sorted(p for p in folder.rglob("*") if p.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def written_bytes(folder: Path) -> int:
    """Bytes of all safetensors files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise LlmoptError(f"{folder}: holds no safetensors file")
    return sum(f.stat().st_size for f in files)
