"""Log-probabilities of a model that is gone, in a file for as long as another one is held against them.

The file has no name, so that nothing of it is left after Ctrl-C, a crash or SIGKILL. Values are kept in float16 and
normalised again when they are read: 4,096 positions of a vocabulary of 49,152 take 0.4 GB.
"""
from pathlib import Path
from tempfile import TemporaryFile

import psutil
import torch
from torch import Tensor

from llmopt.errors import LlmoptError

TYPE = torch.float16
LEAST = torch.finfo(TYPE).min       # a log-probability: what lies below it, and a token that is ruled out, count as it


class Distributions:
    """Rows [vocabulary] of log-probabilities, written once and read again in the same order; ends with `with`."""

    def __init__(self, place: Path, count: int, vocabulary: int):
        """place: the folder whose disk holds them; raises LlmoptError where it has no room for `count` of them."""
        self.vocabulary = vocabulary
        size, free = count * vocabulary * TYPE.itemsize, psutil.disk_usage(str(place)).free
        if size > free:
            raise LlmoptError(f"{place}: {size / 1e9:.2f} GB of disk are needed while two models are compared, "
                              f"{free / 1e9:.2f} GB are free")
        self.file = TemporaryFile(dir=place)

    def __enter__(self) -> "Distributions":
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def write(self, table: Tensor) -> None:
        """Append log-probabilities [n, vocabulary]."""
        self.file.write(table.clamp(min=LEAST).to("cpu", TYPE).numpy().data)

    def rewind(self) -> None:
        """Go back to the first row."""
        self.file.seek(0)

    def read(self, count: int) -> Tensor:
        """The next `count` rows as float32 log-probabilities [count, vocabulary]."""
        table = torch.empty(count, self.vocabulary, dtype=TYPE)
        self.file.readinto(table.numpy().data)
        return table.float().log_softmax(-1)
