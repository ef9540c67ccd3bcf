"""The tensors of safetensors files one by one: which file holds which."""
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmopt.errors import LlmoptError
from llmopt.files.checks import fact_of, read_header, weight_files
from llmopt.files.shards import DTYPES

Places = dict[str, tuple[Path, str]]        # name -> (file, the tensor's name in there)
TYPES = {short: getattr(torch, name.removeprefix("torch.")) for name, short in DTYPES.items()}


def places(folder: Path) -> Places:
    """Every tensor of a folder."""
    return {name: place for file in weight_files(folder) for name, place in of_file(file).items()}


def of_file(file: Path) -> Places:
    """Every tensor of one file."""
    return {name: (file, name) for name in read_header(file)[0]}


def read(wanted: Places) -> dict[str, Tensor]:
    """The tensors at these places, in their order; mapped from the files, so that memory is taken where they change."""
    found: dict[str, Tensor] = {}
    for file in dict.fromkeys(file for file, _ in wanted.values()):
        try:
            with safe_open(file, framework="pt") as opened:
                found |= {name: opened.get_tensor(key) for name, (home, key) in wanted.items() if home == file}
        except (SafetensorError, OSError) as error:
            raise LlmoptError(f"{file}: cannot be read: {fact_of(error)}") from error
    return {name: found[name] for name in wanted}


def dense_bytes(folder: Path, dtype: str | None = None) -> int:
    """Bytes of a folder's weights in memory, as `dtype` or in the types of the files."""
    total = 0
    for entry in (entry for file in weight_files(folder) for entry in read_header(file)[0].values()):
        start, end = entry["data_offsets"]
        total += math.prod(entry["shape"]) * getattr(torch, dtype).itemsize if dtype else end - start
    return total
