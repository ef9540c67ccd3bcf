"""Log-probabilities of a model that is gone, in a file for as long as another one is held against them.

The file has no name, so that nothing of it is left after Ctrl-C, a crash or SIGKILL. Values are kept in float16 and
normalised again when they are read: 4,096 positions of a vocabulary of 49,152 take 0.4 GB.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import psutil
import torch
from torch import Tensor

from llmopt.errors import LlmoptError

TYPE = torch.float16
LEAST = torch.finfo(TYPE).min       # a log-probability: what lies below it, and a token that is ruled out, count as it


class Distributions:
    """Rows [vocabulary] of log-probabilities in a file, written once and read again in the same order."""

    def __init__(self, file: BinaryIO, vocabulary: int):
        self.file, self.vocabulary = file, vocabulary

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


@contextmanager
def room(place: Path, count: int, vocabulary: int) -> Iterator[Distributions]:
    """A file for `count` rows on the disk of the folder `place`; raises LlmoptError where that has no room for it."""
    size, free = count * vocabulary * TYPE.itemsize, psutil.disk_usage(str(place)).free
    if size > free:
        raise LlmoptError(f"{place}: {size / 1e9:.2f} GB of disk are needed while two models are compared, "
                          f"{free / 1e9:.2f} GB are free")
    with TemporaryFile(dir=place) as file:
        yield Distributions(file, vocabulary)
