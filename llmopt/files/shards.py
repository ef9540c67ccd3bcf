"""Writing safetensors: shards close at block boundaries, files are synced, sizes are known before they are written."""
import errno
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmopt.errors import LlmoptError

METADATA = {"format": "pt"}
LARGEST = "2GB"             # file of weights, where nothing else is said
UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
DTYPES = {"torch.int64": "I64", "torch.float64": "F64", "torch.float32": "F32", "torch.int32": "I32",
          "torch.bfloat16": "BF16", "torch.float16": "F16", "torch.int16": "I16",
          "torch.float8_e4m3fn": "F8_E4M3", "torch.int8": "I8",
          "torch.uint8": "U8", "torch.bool": "BOOL"}      # in the order in which the library lays tensors down
PLACE = {dtype: place for place, dtype in enumerate(DTYPES)}


FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "a file may not become as large as this (ulimit -f)"}


class DiskFull(LlmoptError):
    """There is no room for what is to be written."""


@contextmanager
def full_disks() -> Iterator[None]:
    """A disk that fills up while weights are written raises OSError, as it does elsewhere."""
    try:
        yield
    except SafetensorError as error:        # the library wraps the operating system's error in its own
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.ENOSPC if "No space left" in str(error) else 0
        if number in FULL:
            raise OSError(number, os.strerror(number)) from error
        raise


def size_of(text: str) -> int:
    """Bytes in "2GB", "500 MiB", ..."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(\w+)", text)
    if not found or found[2] not in UNITS:
        raise LlmoptError(f"{text!r} given, a size such as 2GB or 500MiB expected")
    return int(float(found[1]) * UNITS[found[2]])


def tensor_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of the values alone; meta tensors count too."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def file_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of one safetensors file that holds `tensors`: values and header; works on meta tensors."""
    header, offset = {"__metadata__": METADATA}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (PLACE[str(item[1].dtype)], item[0])):
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-length // 8) * 8 + offset


def files_bytes(tensors: dict[str, Tensor], max_shard_size: str) -> int:
    """Bytes of all the files into which `write` puts `tensors`; works on meta tensors."""
    files, limit = [{}], size_of(max_shard_size)
    for group in by_block(tensors):
        if is_full(files[-1], group, limit):
            files.append({})
        files[-1] |= group
    return sum(map(file_bytes, files))


def is_full(held: dict[str, Tensor], group: dict[str, Tensor], limit: int) -> bool:
    """True if the next group of tensors begins another file."""
    return bool(held) and tensor_bytes(held) + tensor_bytes(group) > limit


def by_block(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each decoder layer together, every other tensor by itself, in their order."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        block = re.match(r".*?\.\d+(?=\.)", name)
        groups.setdefault(block.group() if block else name, {})[name] = tensor
    return list(groups.values())


def write(folder: Path, tensors: dict[str, Tensor], max_shard_size: str) -> None:
    """Write model.safetensors, or numbered shards and their index, into `folder`."""
    writer = Writer(folder, max_shard_size)
    for group in by_block(tensors):
        writer.add(group)
    writer.close()


class Writer:
    """Takes a checkpoint group by group and holds one shard at a time.

    A shard is closed when the next group would carry it over `max_shard_size`; no group is ever cut, so a decoder layer
    handed over as one group lies in one file.
    """

    def __init__(self, folder: Path, max_shard_size: str):
        self.folder, self.limit = folder, size_of(max_shard_size)
        self.open: dict[str, Tensor] = {}
        self.closed: list[list[str]] = []         # names of the tensors of each file
        self.total = 0

    def add(self, group: dict[str, Tensor]) -> None:
        """Take one group; its tensors may be dropped by the caller, not changed."""
        if is_full(self.open, group, self.limit):
            self._flush()
        self.open |= group
        self.total += tensor_bytes(group)

    def close(self) -> None:
        """Write what is left; number the files and index them, if there are several."""
        self._flush()
        count = len(self.closed)
        if count == 1:
            self._part(1).rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self.closed, start=1):
            final = f"model-{i:05d}-of-{count:05d}.safetensors"
            self._part(i).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        self.closed.append(list(self.open))
        save(self.open, self._part(len(self.closed)))
        self.open = {}

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}"


def save(tensors: dict[str, Tensor], file: Path) -> None:
    """Write one safetensors file."""
    file.touch()
    mode = file.stat().st_mode              # what the user's umask gives; safetensors would make it private
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file, metadata=METADATA)
    file.chmod(mode)


def write_text(file: Path, text: str) -> None:
    """Write `text` beside `file` and rename it: a full disk or Ctrl-C leaves what was there before."""
    file = file.resolve()           # a link stays one
    beside = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def sync(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Force `files` (None: every file of `folder`), and the folder itself, to the disk."""
    for path in [*(sorted(p for p in folder.rglob("*") if p.is_file()) if files is None else files), folder]:
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
