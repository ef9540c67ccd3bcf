"""The JSON Schema of a recipe: with it an editor checks, completes and explains while a recipe is written.

    # yaml-language-server: $schema=recipe.schema.json           (first line of a recipe, after `llmopt schema > ...`)
"""
import inspect
from typing import Any

from pydantic import TypeAdapter

from llmopt.method import Method
from llmopt.parts import GAP, Checked, Part, default_of, fields_of, get, names, plain
from llmopt.recipe.reader import KEYS, SECTIONS, Recipe

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, with every registered method, piece and field."""
    shared: dict[str, Any] = {}
    made = _fields(Recipe, shared)
    parts = {key: _described(made["properties"][key], fields_of(Recipe)[key].description) for key in KEYS}
    for key, cls in SECTIONS.items():
        shared[cls.__name__] = _fields(cls, shared)
        parts[key] = _described({"anyOf": [{"$ref": f"#/$defs/{cls.__name__}"}, {"type": "null"}]},
                                fields_of(Recipe)[key].description)
    parts["steps"]["minItems"] = 1
    return {"$schema": DRAFT, "title": "llmopt recipe", "type": "object", "properties": parts, "required": ["steps"],
            "additionalProperties": False, "$defs": shared}


def _fields(cls: type[Checked], shared: dict[str, Any]) -> dict[str, Any]:
    """An object with the fields of `cls`; what it refers to goes into `shared`."""
    made = TypeAdapter(cls).json_schema()
    for name, inner in made.pop("$defs", {}).items():
        shared.setdefault(name, _filled(inner, shared))
    for key, item in fields_of(cls).items():
        if not item.is_required():
            made["properties"][key]["default"] = plain(default_of(item))
    return _filled(made, shared) | {"additionalProperties": False, "description": _about(cls)}


def _filled(node: Any, shared: dict[str, Any]) -> Any:
    """`node` with a reference in place of every gap that Part leaves."""
    if isinstance(node, list):
        return [_filled(item, shared) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _filled(value, shared) for key, value in node.items() if key != GAP}
    return made | {"$ref": _choice(*node[GAP], shared=shared)} if GAP in node else made


def _choice(kind: str, *chosen: str, shared: dict[str, Any]) -> str:
    """A reference to the entries that name one of these pieces: NAME, or {NAME: fields}."""
    word = kind.replace(" ", "-")
    key = word if list(chosen) == names(kind) else ".or.".join((word, *chosen))
    if key not in shared:
        shared[key] = {}                                    # here already for pieces that hold others of their kind
        bare = [name for name in chosen if not any(item.is_required() for item in fields_of(get(name, kind)).values())]
        each = {name: _described({"anyOf": [{"$ref": _piece(word, get(name, kind), shared)}, {"type": "null"}]},
                                 _about(get(name, kind))) for name in chosen}
        shared[key] |= {"anyOf": [{"enum": bare}, {"type": "object", "properties": each, "additionalProperties": False,
                                                   "minProperties": 1, "maxProperties": 1}]}
    return f"#/$defs/{key}"


def _piece(word: str, cls: type[Part], shared: dict[str, Any]) -> str:
    key = f"{word}.{cls.name}"
    if key not in shared:
        shared[key] = {}
        shared[key] |= _fields(cls, shared)
    return f"#/$defs/{key}"


def _described(node: dict[str, Any], text: str | None) -> dict[str, Any]:
    return node | {"description": text} if text else node


def _about(cls: type[Checked]) -> str:
    """A line on the purpose of a class; for a method, the first of its module."""
    text = inspect.getmodule(cls).__doc__ if issubclass(cls, Method) else cls.__doc__
    return (text or "").strip().splitlines()[0] if text else ""
