"""The head of a GGUF file, llama.cpp's format: its metadata, and where its tensors lie. No value of a tensor is read.

    "GGUF", version u32, tensors u64, keys u64;  a key: name, type u32, value;  a tensor: name, dims, type u32, offset

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
import importlib.util
import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError
from llmopt.files.checks import MAX_TENSORS

MAGIC, VERSIONS = b"GGUF", (2, 3)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_KEYS, MAX_DIMS, MAX_NUMBERS = 100_000, 4, 4_000_000


@dataclass(frozen=True)
class Stored:
    """One tensor of the file. shape: as torch has it. start, size: bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    size: int


@dataclass(frozen=True)
class Head:
    """facts: numbers, strings, lists of numbers; of a list of strings its length."""

    file: Path
    facts: dict[str, Any]
    tensors: tuple[Stored, ...]

    @property
    def architecture(self) -> str:
        return str(self.facts["general.architecture"])

    def types(self) -> dict[str, int]:
        """How many tensors are of each type, the most frequent first."""
        return dict(Counter(tensor.type for tensor in self.tensors).most_common())


def is_gguf(file: Path) -> bool:
    """True for a file that begins like a GGUF one, or is called so."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return file.suffix == ".gguf" or stream.read(4) == MAGIC


def read_head(file: Path) -> Head:
    """The head of a file; raises LlmoptError for one that is cut off, damaged, of another version or byte order."""
    if importlib.util.find_spec("gguf") is None:
        raise LlmoptError(f"{file}: the package gguf, which reads such files, is not installed: "
                          "pip install 'llmopt[gguf]'")
    if not file.stat().st_size:
        raise LlmoptError(f"{file}: the file is empty")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return _Reader(file, mapped).head()


class _Reader:
    """Goes through the bytes of a head, from the first to the last."""

    def __init__(self, file: Path, mapped: mmap.mmap):
        self.file, self.mapped, self.at = file, mapped, 0

    def head(self) -> Head:
        self._check_start()
        count, keys = self._numbers("QQ")
        if count > MAX_TENSORS or keys > MAX_KEYS:
            raise LlmoptError(f"{self.file}: its head tells of {count:,} tensors and {keys:,} keys, which no model has")
        facts: dict[str, Any] = {}
        for _ in range(keys):
            name = self._string()
            facts[name] = self._value(*self._numbers("I"))
        if "general.architecture" not in facts:
            raise LlmoptError(f"{self.file}: its head does not tell the model's architecture (general.architecture)")
        table = [self._entry() for _ in range(count)]
        return Head(self.file, facts, tuple(self._placed(table, facts.get("general.alignment", 32))))

    def _check_start(self) -> None:
        if self.mapped[:4] != MAGIC:
            raise LlmoptError(f"{self.file}: not a GGUF file")
        self.at = 4
        version, = self._numbers("I")
        if version & 0xFFFF == 0:
            raise LlmoptError(f"{self.file}: a GGUF file of big-endian numbers, which is not read")
        if version not in VERSIONS:
            raise LlmoptError(f"{self.file}: version {version} of GGUF; read are {' and '.join(map(str, VERSIONS))}")

    def _numbers(self, form: str) -> tuple:
        try:
            found = struct.unpack_from(f"<{form}", self.mapped, self.at)
        except struct.error as error:
            raise self._cut_off() from error
        self.at += struct.calcsize(f"<{form}")
        return found

    def _string(self) -> str:
        length, = self._numbers("Q")
        if self.at + length > len(self.mapped):
            raise self._cut_off()
        self.at += length
        return self.mapped[self.at - length:self.at].decode("utf-8", errors="replace")

    def _cut_off(self) -> LlmoptError:
        return LlmoptError(f"{self.file}: its head goes on behind the end of the file ({len(self.mapped):,} bytes). "
                           "The download was cut off, or the file is damaged; fetch it again")

    def _value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self._numbers(NUMBERS[kind])[0]
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise LlmoptError(f"{self.file}: its head holds a value of type {kind}, which GGUF does not know")
        inner, count = self._numbers("IQ")
        if inner in NUMBERS and count <= MAX_NUMBERS:
            return list(self._numbers(f"{count}{NUMBERS[inner]}"))
        if inner != STRING or count > MAX_NUMBERS:
            raise LlmoptError(f"{self.file}: its head holds a list of {count:,} values of type {inner}, which no model "
                              "has")
        for _ in range(count):
            length, = self._numbers("Q")
            self.at += length
        return count

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dims, = self._numbers("I")
        if dims > MAX_DIMS:
            raise LlmoptError(f"{self.file}: {name[:80]!r} has {dims} dimensions; a tensor of GGUF has at most "
                              f"{MAX_DIMS}")
        shape = self._numbers(f"{dims}Q")
        return name, tuple(reversed(shape)), *self._numbers("IQ")

    def _placed(self, table: list[tuple], alignment: int) -> list[Stored]:
        """The tensors with their bytes in the file, each held against the file's length."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        begin, known, placed = -(-self.at // alignment) * alignment, {int(t): t for t in GGMLQuantizationType}, []
        for name, shape, number, offset in table:
            if number not in known:
                raise LlmoptError(f"{self.file}: {name} is of the type {number}, which the package gguf does not know; "
                                  "is there a newer one? pip install --upgrade gguf")
            values, taken = GGML_QUANT_SIZES[known[number]]
            if shape and shape[-1] % values:
                raise LlmoptError(f"{self.file}: rows of {name} have {shape[-1]} values, which blocks of "
                                  f"{known[number].name} ({values} values) do not divide")
            size, start = math.prod(shape) // values * taken, begin + offset
            if start + size > len(self.mapped):
                raise LlmoptError(f"{self.file}: {name} ends at byte {start + size:,}, and the file has "
                                  f"{len(self.mapped):,}. The download was cut off; fetch it again")
            placed.append(Stored(name, shape, known[number].name, start, size))
        return placed
