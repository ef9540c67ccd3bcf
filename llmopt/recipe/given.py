"""What Python code hands over in the place of a recipe file: a recipe in any form, or steps in any form."""
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError, closest
from llmopt.files.packaged import REFERENCE, recipes
from llmopt.method import Method
from llmopt.parts import build, default_of, fields_of, names, plain
from llmopt.recipe.assign import assign
from llmopt.recipe.one_line import method_name, one_line
from llmopt.recipe.reader import Recipe, from_data, load
from llmopt.recipe.schemes import ELSEWHERE, SCHEMES
from llmopt.recipe.words import Words


def recipe_of(given: Any, model: str | None = None, words: Mapping[str, Any] | None = None,
              trust_remote_code: bool = False) -> Recipe:
    """The Recipe that `given` stands for; `model` replaces its model.id, `words` (see words.Words) change it.

    given: a Recipe, its plain data, a file, a packaged name, a scheme such as W4A16, steps (see `methods_of`), or None
    where the words say what is to be done.
    """
    asked = Words(**scheme_words(given, words or {}))
    if is_recipe(given):
        if asked.steps:
            raise LlmoptError(f"a recipe and {asked.steps[0]} both say what to do; give one of them")
        return _changed(given, model, asked.assignments(), trust_remote_code)
    if asked.steps:
        return one_line(model or REFERENCE, (), trust_remote_code, **vars(asked))
    return _changed({"steps": list(map(entry, methods_of(given)))}, model, asked.assignments(), trust_remote_code)


def scheme_words(given: Any, words: Mapping[str, Any]) -> dict[str, Any]:
    """The words that were said, a scheme in the place of steps among them; two that say what to do are refused."""
    said = {key: value for key, value in words.items() if value is not None}
    if not is_scheme(given) and given is not None and {"scheme", "bits"} & said.keys():
        raise LlmoptError(f"steps and {min({'scheme', 'bits'} & said.keys())} both say what to do; give one of them")
    return said | {"scheme": given} if is_scheme(given) else said


def is_recipe(given: Any) -> bool:
    """True for a whole recipe: an object, a file, a packaged name, or a mapping with `steps`."""
    if isinstance(given, (str, os.PathLike)):
        name = os.fspath(given)
        return name in recipes() or Path(name).suffix in (".yaml", ".yml") or Path(name).expanduser().is_file()
    return isinstance(given, Recipe) or isinstance(given, Mapping) and "steps" in given


def is_scheme(given: Any) -> bool:
    """True for a name such as W4A16, those of other tools included."""
    return isinstance(given, str) and given.upper().replace("-", "_") in (*SCHEMES, *ELSEWHERE)


def methods_of(given: Any) -> list[Method]:
    """The steps in `given`: one or a list of methods, their classes, names, or {name: fields}."""
    if isinstance(given, Mapping):
        return [build(_name(name), dict(fields or {})) for name, fields in given.items()]
    if isinstance(given, (list, tuple)):
        return [method for one in given for method in methods_of(one)]
    if isinstance(given, type) and issubclass(given, Method):
        return [given()]
    if isinstance(given, str):
        return [build(_name(given), {})]
    if not isinstance(given, Method):
        raise LlmoptError(f"steps: methods such as llmopt.quant.RTN() expected, {str(given)[:80]!r} given")
    return [given]


def entry(step: Method) -> dict[str, dict[str, Any]]:
    """A step as a recipe writes it: {name: the fields that are not at their defaults}."""
    values = {key: plain(getattr(step, key)) for key in fields_of(step)}
    usual = {key: plain(default_of(item)) for key, item in fields_of(step).items()}
    return {step.name: {key: value for key, value in values.items() if value != usual[key]}}


def _name(word: Any) -> str:
    try:
        return method_name(word)
    except LlmoptError as error:
        shorts = [name.rpartition(".")[2] for name in names()]
        near = closest(word, [*names(), *shorts, *recipes(), *SCHEMES])
        raise LlmoptError(f"{word!r} is no method, scheme, packaged recipe or file{near}; `llmopt methods` lists the "
                          f"methods, the recipes are {', '.join(recipes())}") from error


def _changed(given: Any, model: str | None, sets: tuple[str, ...], trust: bool) -> Recipe:
    """A recipe with another model and `--set`-like changes."""
    if isinstance(given, (str, os.PathLike)):
        return load(os.fspath(given), sets, model, trust)
    if isinstance(given, Recipe):
        if model is None and not sets:
            return given
        trust = trust or given.model.trust_remote_code
        given = replace(given, model=replace(given.model, trust_remote_code=False)).resolved()
    data = dict(given)
    if model is not None:
        data["model"] = dict(data.get("model") or {}) | {"id": model}
    for change in sets:
        assign(data, change)
    return from_data(data, trust_remote_code=trust)
