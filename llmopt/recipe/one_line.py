"""A recipe from the words of one command line, without a YAML file: `llmopt compress MODEL --scheme W4A16`.

What is not said is decided here, from the model's config alone: the recipe that comes of it is one like any other, and
repeats the run as it is written into the checkpoint.
"""
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from llmopt.errors import LlmoptError, closest
from llmopt.method import STAGES, Method
from llmopt.model.blocks import blocks
from llmopt.model.loading import check_dense, read_config
from llmopt.model.skeleton import skeleton
from llmopt.parts import get, names
from llmopt.recipe.assign import assign
from llmopt.recipe.reader import Recipe, from_data
from llmopt.recipe.schemes import GROUP, SCHEMES, scheme_fields
from llmopt.recipe.words import Words
from llmopt.specs import ModelSpec

LOG = logging.getLogger(__name__)
SOLVER = "quant.gptq"                   # where bits are asked for and no method is named
ALLOCATION = "lim"                      # of fractions of bits: one forward, whatever the size; streamed models too
SIZES = (GROUP, 64, 32)                 # group sizes that inference kernels are written for


def one_line(model: str, sets: tuple[str, ...] = (), trust_remote_code: bool = False, **words: Any) -> Recipe:
    """The recipe that the `words` (see Words) ask for on a model; `sets` are "bits=3" overrides of it.

    Raises LlmoptError for words that ask for nothing, contradict each other, or do not fit the model.
    """
    asked = Words(**words)
    data: dict[str, Any] = {"model": {"id": model}, "data": {}, "steps": [{name: _fields(name, asked)}
                                                                          for name in _names(asked)]}
    for given in (*asked.assignments(), *sets):
        assign(data, given)
    made = from_data(data, trust_remote_code)           # all errors but those of the model
    check_dense(made.model)
    _choose_type(data, made)
    _fit(data, made.steps, partial(_skeleton, made.model))
    return from_data(data, trust_remote_code)


def entries(asked: Words, model: Callable[[], nn.Module]) -> list[dict[str, dict[str, Any]]]:
    """The steps, each {method: fields}, that the words ask for; `model` gives one whose shapes decide what is left."""
    data = {"steps": [{name: _fields(name, asked)} for name in _names(asked)]}
    _fit(data, from_data(data).steps, model)
    return data["steps"]


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


def _fields(name: str, asked: Words) -> dict[str, Any]:
    """The fields of one step that the words decide."""
    if get(name).stage != "quant":
        return {}
    bits = 4 if asked.bits is None else asked.bits
    fields = {"bits": int(bits)} if bits == int(bits) else {"bits": bits, "allocate": ALLOCATION}
    if asked.scheme:
        fields = {key: value for key, value in scheme_fields(asked.scheme).items() if key != "group_size"}
    return fields | ({} if asked.group_size is None else {"group_size": asked.group_size})


def _given(entry: Any, field: str) -> Any:
    """A field of a step as recipes write it; None if it is not there."""
    return (next(iter(entry.values())) or {}).get(field) if isinstance(entry, dict) else None


def _choose_type(data: dict[str, Any], made: Recipe) -> None:
    """Load the model as bfloat16 where no type was given and a scheme wants this one (see Scheme.in_bfloat16)."""
    scheme = next((name for step in made.steps if (name := getattr(step, "scheme", None))), None)
    if scheme is None or not SCHEMES[scheme].in_bfloat16 or made.model.dtype is not None:
        return
    stored = read_config(made.model)[1].dtype
    if stored != torch.bfloat16:
        LOG.info("dtype: bfloat16, as scheme %s is computed in it (the model is %s)", scheme,
                 str(stored).removeprefix("torch."))
        assign(data, "model.dtype=bfloat16")


def _fit(data: dict[str, Any], steps: tuple[Method, ...], model: Callable[[], nn.Module]) -> None:
    """Choose the group size where none was given, and check one that was."""
    for i, step in enumerate(steps):
        if step.stage == "quant" and (step.scheme is None or SCHEMES[step.scheme].plain):
            size = _group_size(_given(data["steps"][i], "group_size"), step, model)
            assign(data, f"steps.{i}.group_size={size}")


def _group_size(asked: int | None, step: Any, model: Callable[[], nn.Module]) -> int:
    """The group size that was asked for, else GROUP, else the largest that divides all widths of the model."""
    if asked == -1:
        return -1
    widths = sorted({p.in_features for block in blocks(model()) for group in block.weights() for p in group})
    fitting, told = [size for size in SIZES if not any(width % size for width in widths)], ", ".join(map(str, widths))
    if asked is not None and any(width % asked for width in widths) and not (step.ignore or step.overrides):
        raise LlmoptError(f"group_size {asked} does not divide all widths of the model ({told}). "
                          f"Give {', '.join(map(str, [*fitting, -1]))} (-1: one scale per output channel)")
    size = asked or max(fitting, default=-1)
    if asked is None and size != GROUP:
        LOG.info("group_size: %s, as %d does not divide all widths of the model (%s)",
                 size if size > 0 else "-1 (one scale per output channel)", GROUP, told)
    return size


def _skeleton(spec: ModelSpec) -> nn.Module:
    """The model without weights."""
    return skeleton(read_config(spec)[1], torch.float32, spec.trust_remote_code)
