"""The words of one command line, and what is wrong with them: known before torch is imported."""
import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from llmopt.errors import FieldError, LlmoptError
from llmopt.parts import Checked, default_of, fields_of, in_our_words
from llmopt.recipe.schemes import scheme_name
from llmopt.recipe.sources import source
from llmopt.specs import MAX_SAMPLES, MAX_SEED, DataSpec, Dtype

Names = Annotated[tuple[str, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else
                                                   tuple(given) if isinstance(given, list) else given)]
SOURCE = ("name", "path", "config", "split", "column", "template")      # of the data: where it comes from
GroupSize = Annotated[int, Field(ge=1)] | Literal[-1]


@in_our_words
@dataclass(frozen=True)
class Words(Checked):
    """What is asked of a run beside its model; the command has an option for each word."""

    scheme: str | None = Field(None, description="a name such as W4A16")
    bits: int | float | None = Field(None, description="average over all weights quantized")
    method: Names = Field((), description="methods, by name or by the last word of it")
    group_size: GroupSize | None = Field(None, description="input columns that share a scale; -1: all of a row")
    dtype: Dtype | None = None
    device: str | None = None
    revision: str | None = None
    gguf_file: str | None = None
    adapter: str | None = None
    dequantize: bool = False
    data: str | None = Field(None, description="a file, the name of a source, or a dataset of the hub")
    samples: int | None = Field(None, ge=1, le=MAX_SAMPLES)
    length: int | None = Field(None, ge=2)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)

    def check(self) -> None:
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise FieldError("bits", self.bits, "a number from 2 to 8, or an average such as 3.5,")
        if self.scheme is not None and self.bits is not None:
            raise LlmoptError(f"scheme {self.scheme} says how many bits; give it or bits {self.bits:g}, not both")
        if self.scheme is not None:
            scheme_name(self.scheme)
        if self.data is not None:
            source(self.data)

    @property
    def steps(self) -> tuple[str, ...]:
        """The words that say what is to be done, as they were given."""
        given = {"scheme": self.scheme, "bits": self.bits, "method": self.method, "group-size": self.group_size}
        return tuple(word for word, value in given.items() if value not in (None, ()))

    def assignments(self) -> tuple[str, ...]:
        """All other words, as `--set` takes them: what they change in any recipe.

        Other data comes with the rows, their number and length, that the recipe asks for.
        """
        made = {f"model.{key}": getattr(self, key) for key in ("dtype", "device", "revision", "gguf_file", "adapter")}
        made |= {"model.dequantize": self.dequantize or None, "data.samples": self.samples,
                 "data.length": self.length, "data.seed": self.seed, "seed": self.seed}
        said = {key: value for key, value in made.items() if value is not None}
        return tuple(f"{key}={json.dumps(value)}" for key, value in (self._source() | said).items())

    def _source(self) -> dict[str, Any]:
        """The keys that say where other data comes from, so that nothing is left of the recipe's own source."""
        if self.data is None:
            return {}
        keys, given = fields_of(DataSpec), source(self.data)
        return {f"data.{key}": given.get(key, default_of(keys[key])) for key in SOURCE}
