"""The tensors of safetensors files one by one: which file holds which, and which are made when they are read."""
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmopt.errors import LlmoptError
from llmopt.files.checks import fact_of, read_header, weight_files
from llmopt.files.shards import DTYPES


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor that lies in no file as it is: of blocks of codes, of codes and scales, of a weight and an adapter.

    file: where most of it lies. make: gives it, and takes no memory beyond it that would last.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    make: Callable[[], Tensor]


Place = tuple[Path, str] | Made             # (file, the tensor's name in there)
Places = dict[str, Place]
TYPES = {short: getattr(torch, name.removeprefix("torch.")) for name, short in DTYPES.items()}


def file_of(place: Place) -> Path:
    """The file that a tensor is read from."""
    return place.file if isinstance(place, Made) else place[0]


def places(folder: Path) -> Places:
    """Every tensor of the safetensors files of a folder."""
    return {name: place for file in weight_files(folder) for name, place in of_file(file).items()}


def of_file(file: Path) -> Places:
    """Every tensor of one file."""
    return {name: (file, name) for name in read_header(file)[0]}


def outlines(wanted: Places) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """{name: (shape, type)} of the tensors at these places; None for a type that torch has not."""
    headers = {file: read_header(file)[0] for file in {file_of(place) for place in wanted.values()
                                                       if not isinstance(place, Made)}}
    found: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    for name, place in wanted.items():
        if isinstance(place, Made):
            found[name] = tuple(place.shape), place.dtype
        else:
            entry: dict[str, Any] = headers[place[0]][place[1]]
            found[name] = tuple(entry["shape"]), TYPES.get(entry["dtype"])
    return found


def read(wanted: Places) -> dict[str, Tensor]:
    """The tensors at these places, in their order; mapped from the files, so that memory is taken where they change."""
    found = {name: place.make() for name, place in wanted.items() if isinstance(place, Made)}
    stored = {name: place for name, place in wanted.items() if not isinstance(place, Made)}
    for file in dict.fromkeys(file for file, _ in stored.values()):
        try:
            with safe_open(file, framework="pt") as opened:
                found |= {name: opened.get_tensor(key) for name, (home, key) in stored.items() if home == file}
        except (SafetensorError, OSError) as error:
            raise LlmoptError(f"{file}: cannot be read: {fact_of(error)}") from error
    return {name: found[name] for name in wanted}


def bytes_of(wanted: Places, dtype: str | None = None) -> int:
    """Bytes of these tensors in memory, as `dtype` or in their own types."""
    own = getattr(torch, dtype).itemsize if dtype else None
    return sum(math.prod(shape) * (own or (stored or torch.uint8).itemsize)
               for shape, stored in outlines(wanted).values())


def dense_bytes(folder: Path, dtype: str | None = None) -> int:
    """Bytes of a folder's weights in memory, as `dtype` or in the types of the files."""
    total = 0
    for entry in (entry for file in weight_files(folder) for entry in read_header(file)[0].values()):
        start, end = entry["data_offsets"]
        total += math.prod(entry["shape"]) * getattr(torch, dtype).itemsize if dtype else end - start
    return total
