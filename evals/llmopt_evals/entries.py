"""Methods as a command names them: entries of a recipe's `steps`, and checkpoints that hold what they have learned."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmopt import runtime
from llmopt.errors import LlmoptError, naming
from llmopt.files import tensors
from llmopt.files.checks import load_json
from llmopt.kv.base import Scorer
from llmopt.method import Method, Record, Run
from llmopt.parts import build, fields_of, get
from llmopt.recipe.yaml_lines import read_yaml
from llmopt.runtime.attach import CacheMethod, StoreMethod, methods_of

CHOICES = {"ratio", "budget"}           # one of them says how much is kept


def read(word: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, fields) of an entry of `steps`, or of each of a list of them."""
    with naming(word):
        found = read_yaml(word, "step")[0]
        return [_pair(item) for item in (found if isinstance(found, list) else [found])]


def _pair(item: Any) -> tuple[str, dict[str, Any]]:
    name, given = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, None)
    if not isinstance(name, str) or not isinstance(given, dict | None):
        raise LlmoptError("NAME or {NAME: {FIELD: VALUE}} expected, or a list of such entries")
    return name, given or {}


def is_open(name: str, given: dict[str, Any]) -> bool:
    """True if an entry leaves open how much is kept."""
    return "ratio" in fields_of(get(name)) and not CHOICES & given.keys()


def made(word: str, ratio: float) -> list[Method]:
    """The methods of an entry; `ratio` is added where it does not say how much is kept."""
    with naming(word):
        return [build(name, given | ({"ratio": ratio} if is_open(name, given) else {})) for name, given in read(word)]


def divided(words: Sequence[str]) -> tuple[list[Method], list[str], bool]:
    """(the head scores among entries and folders, the words that act on the cache, True if one of them needs data)."""
    scores: list[Method] = []
    acting, needed = [], False
    for word in words:
        methods = [] if Path(word).expanduser().is_dir() else made(word, 0.5)
        if methods and all(method.stage == "score" for method in methods):
            scores += methods
        elif all(isinstance(method, CacheMethod | StoreMethod) for method in methods):
            acting.append(word)
        else:
            raise LlmoptError(f"{word}: methods that act on the cache expected, or head scores apart from them")
        needed |= any(method.needs_data for method in methods)
    return scores, acting, needed


@dataclass(frozen=True)
class Setting:
    """Methods with what they have learned, and the words that name them. ratio: None where the words say it."""

    words: str
    parts: tuple[tuple[Method, Record], ...] = ()
    ratio: float | None = None


DENSE = Setting("dense")


def settings(words: Sequence[str], ratios: Sequence[float], model: nn.Module, run: Run) -> Iterator[Setting]:
    """Every entry or folder at every ratio; a scorer learns once for all that score alike, from what `run` holds."""
    known: dict[tuple[Any, ...], Record] = {}
    for word in words:
        folder = Path(word).expanduser()
        if folder.is_dir():
            parts = stored(folder, model)
            varied = [any("ratio" in fields_of(method) for method, _ in parts)] * len(parts)
        else:
            with naming(word):
                parts = [(method, planned(method, model, run, known)) for method in made(word, ratios[0])]
            varied = [is_open(*entry) for entry in read(word)]
        for ratio in ratios if any(varied) else [None]:
            yield Setting(word, tuple((at(method, ratio) if open_ else method, record)
                                      for (method, record), open_ in zip(parts, varied, strict=True)), ratio)


def planned(method: CacheMethod | StoreMethod, model: nn.Module, run: Run,
            known: dict[tuple[Any, ...], Record]) -> Record:
    """The record of a method's plan; known: what scorers have learned so far."""
    if not isinstance(method, Scorer):
        return method.plan(model, run)
    if method.scoring not in known:
        known[method.scoring] = method.learn(model, run)
    return method.planned(known[method.scoring], model, run)


def at(method: Method, ratio: float) -> Method:
    """The method with that ratio in place of what it says of it; one that drops nothing as it is."""
    return replace(method, ratio=ratio, budget=None) if "ratio" in fields_of(method) else method


def stored(folder: Path, model: nn.Module) -> list[tuple[Method, Record]]:
    """The methods of a checkpoint that act on the cache, as they learned to; held against this model."""
    with naming(str(folder)):
        found = {name.removeprefix("llmopt."): place for name, place in tensors.places(folder).items()
                 if name.startswith("llmopt.")}

        def of(step: str) -> dict[str, Tensor]:
            return tensors.read({name.removeprefix(f"{step}."): place for name, place in found.items()
                                 if name.startswith(f"{step}.")})

        parts = methods_of(load_json(folder / "config.json").get("llmopt") or {}, of)
        if not parts:
            raise LlmoptError("this folder holds no method that acts on the cache")
        with runtime.attached(model):
            for method, record in parts:
                method.restore(model, record)
        return parts
