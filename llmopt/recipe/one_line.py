"""A recipe from the words of one command line, without a YAML file: `llmopt compress MODEL --scheme W4A16`.

What is not said is decided here, from the model's config alone, and written out: the recipe that comes of it is one
like any other, whose text repeats the run.
"""
import json
import logging
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from torch import nn

from llmopt.errors import FieldError, LlmoptError, closest
from llmopt.method import STAGES
from llmopt.model.blocks import blocks
from llmopt.model.loading import check_dense, read_config
from llmopt.model.skeleton import skeleton
from llmopt.parts import Checked, get, in_our_words, names
from llmopt.recipe.assign import assign
from llmopt.recipe.reader import Recipe, from_data
from llmopt.recipe.schemes import GROUP, scheme_fields
from llmopt.recipe.sources import source
from llmopt.specs import MAX_SAMPLES, MAX_SEED, Dtype, ModelSpec

LOG = logging.getLogger(__name__)
SOLVER = "quant.gptq"                   # where bits are asked for and no method is named
ALLOCATION = "lim"                      # of fractions of bits: one forward, whatever the size; streamed models too
SIZES = (GROUP, 64, 32)                 # group sizes that inference kernels are written for
Names = Annotated[tuple[str, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else
                                                   tuple(given) if isinstance(given, list) else given)]


@in_our_words
@dataclass(frozen=True)
class Words(Checked):
    """What is asked of a run beside its model; the command has an option for each word."""

    scheme: str | None = Field(None, description="a name such as W4A16")
    bits: int | float | None = Field(None, description="average over all weights quantized")
    method: Names = Field((), description="methods, by name or by the last word of it")
    group_size: int | None = Field(None, description="input columns that share a scale")
    dtype: Dtype | None = None
    device: str | None = None
    revision: str | None = None
    data: str | None = Field(None, description="a file, the name of a source, or a dataset of the hub")
    samples: int | None = Field(None, ge=1, le=MAX_SAMPLES)
    length: int | None = Field(None, ge=2)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)

    def check(self) -> None:
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise FieldError("bits", self.bits, "a number from 2 to 8, or an average such as 3.5,")
        if self.scheme and self.bits is not None:
            raise LlmoptError(f"scheme {self.scheme} says how many bits; give it or bits {self.bits:g}, not both")

    @property
    def steps(self) -> tuple[str, ...]:
        """The words that say what is to be done, as they were given."""
        given = {"scheme": self.scheme, "bits": self.bits, "method": self.method, "group-size": self.group_size}
        return tuple(word for word, value in given.items() if value not in (None, ()))

    def assignments(self) -> tuple[str, ...]:
        """All other words, as `--set` takes them: what they change in any recipe."""
        made = {f"model.{key}": getattr(self, key) for key in ("dtype", "device", "revision")}
        made |= {"data": source(self.data) if self.data is not None else None, "data.samples": self.samples,
                 "data.length": self.length, "data.seed": self.seed, "seed": self.seed}
        return tuple(f"{key}={json.dumps(value)}" for key, value in made.items() if value is not None)


def one_line(model: str, sets: tuple[str, ...] = (), trust_remote_code: bool = False, **words: Any) -> Recipe:
    """The recipe that the `words` (see Words) ask for on a model; `sets` are "bits=3" overrides of it.

    Raises LlmoptError for words that ask for nothing, contradict each other, or do not fit the model.
    """
    asked = Words(**words)
    data: dict[str, Any] = {"model": {"id": model}, "data": {}, "steps": _names(asked)}
    for given in asked.assignments():
        assign(data, given)
    spec = ModelSpec(**data["model"], trust_remote_code=trust_remote_code)
    check_dense(spec)
    data["steps"] = entries(asked, partial(_skeleton, spec))
    for given in sets:
        assign(data, given)
    if not data["data"]:
        del data["data"]
    return from_data(data, trust_remote_code)


def entries(asked: Words, model: Callable[[], nn.Module]) -> list[dict[str, dict[str, Any]]]:
    """The steps, each {method: fields}, that the words ask for; `model` gives one whose shapes decide what is left."""
    return [{name: _fields(name, asked, model)} for name in _names(asked)]


def method_name(word: str) -> str:
    """The method of this name, or whose name ends in it; raises LlmoptError for none, and for several."""
    known = names()
    found = [name for name in known if name == word] or [name for name in known if name.endswith(f".{word}")]
    if len(found) > 1:
        raise LlmoptError(f"method {word!r} is ambiguous: {' or '.join(found)}")
    if not found:
        shorts = {name.rpartition(".")[2]: name for name in known}
        raise LlmoptError(f"there is no method {word!r}{closest(word, [*known, *shorts])}. Choices: {', '.join(known)}")
    return found[0]


def _names(asked: Words) -> list[str]:
    """The methods of the steps, in the order of a recipe; the solver is the default one where none is named."""
    if not asked.steps:
        raise LlmoptError("a scheme, bits or a method is needed: what is to be done with the model?")
    chosen = [method_name(word) for word in asked.method]
    stages = [get(name).stage for name in chosen]
    if "quant" not in stages and (asked.scheme or asked.bits is not None):
        chosen.append(SOLVER)
    elif "quant" not in stages and asked.group_size is not None:
        raise LlmoptError("group_size belongs to quantization: give a scheme, bits or a quant.* method with it")
    return sorted(chosen, key=lambda name: STAGES.index(get(name).stage))


def _fields(name: str, asked: Words, model: Callable[[], nn.Module]) -> dict[str, Any]:
    """The fields of one step that the words, and the model's shapes, decide."""
    if get(name).stage != "quant":
        return {}
    fields = scheme_fields(asked.scheme) if asked.scheme else {"bits": 4 if asked.bits is None else asked.bits}
    fields["group_size"] = _group_size(asked.group_size, fields.get("group_size", GROUP), model)
    if fields["bits"] != int(fields["bits"]):
        return fields | {"allocate": ALLOCATION}
    return fields | {"bits": int(fields["bits"])}


def _group_size(asked: int | None, usual: int, model: Callable[[], nn.Module]) -> int:
    """The group size that was asked for, else the usual one, else the largest that divides all widths of the model."""
    if asked == -1 or usual == -1:
        return -1
    widths = sorted({p.in_features for block in blocks(model()) for p in block.projections()})
    fitting = [size for size in SIZES if all(width % size == 0 for width in widths)]
    told = ", ".join(map(str, widths))
    if asked is not None and (asked < 1 or any(width % asked for width in widths)):
        raise LlmoptError(f"group_size {asked} does not divide all widths of the model ({told}). "
                          f"Give {', '.join(map(str, [*fitting, -1]))} (-1: one scale per output channel)")
    if asked is not None or usual in fitting:
        return asked or usual
    size = max((size for size in fitting if size < usual), default=-1)
    LOG.info("group_size: %s, as %d does not divide all widths of the model (%s)",
             size if size > 0 else "-1 (one scale per output channel)", usual, told)
    return size


def _skeleton(spec: ModelSpec) -> nn.Module:
    """The model without weights."""
    import torch

    return skeleton(read_config(spec)[1], torch.float32, spec.trust_remote_code)
