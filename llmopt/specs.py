"""The model, data and eval sections of a recipe."""
from dataclasses import dataclass, field
from typing import Literal

from llmopt.errors import FieldError
from llmopt.parts import Checked

MAX_SAMPLES = 1_000_000


@dataclass(frozen=True)
class ModelSpec(Checked):
    """Which model; `llmopt/reference` is the embedded one. dtype null: the checkpoint's own."""

    id: str = "llmopt/reference"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    revision: str | None = None
    device: str = "cpu"
    trust_remote_code: bool = False

    def check(self) -> None:
        if not self.id:
            raise FieldError("id", self.id, "a folder or a hub name")


@dataclass(frozen=True)
class DataSpec(Checked):
    """Calibration data; see llmopt.data for what each source means. length null: min(512, the model's maximum)."""

    name: Literal["world", "text", "ids", "hub"] = "world"
    path: str | None = None
    config: str | None = None
    split: str = "train"
    column: str = "text"
    template: Literal["chat"] | None = None
    samples: int = 128
    length: int | None = None
    batch_size: int = 8
    seed: int = 0

    def check(self) -> None:
        for key in ("samples", "batch_size"):
            if not 1 <= getattr(self, key) <= MAX_SAMPLES:
                raise FieldError(key, getattr(self, key), f"a number from 1 to {MAX_SAMPLES}")
        if not 0 <= self.seed < 2**32:
            raise FieldError("seed", self.seed, f"a number from 0 to {2**32 - 1}")
        if self.length is not None and self.length < 2:
            raise FieldError("length", self.length, "at least 2 tokens")
        if self.name != "world" and self.path is None:
            raise FieldError("path", None, f"a file or dataset, because data.name is {self.name!r}")


@dataclass(frozen=True)
class EvalSpec(Checked):
    """lm-eval tasks that score the dense and the compressed model; none: no scores."""

    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    batch_size: int = 16
    text: str | None = None              # the file that the task text_ppl reads

    def check(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise FieldError("limit", self.limit, "at least 1 document, or null for all")
        if self.batch_size < 1:
            raise FieldError("batch_size", self.batch_size, "at least 1")
