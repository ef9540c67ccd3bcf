"""Named pieces with checked fields, and the registry of those that a recipe can name."""
import importlib
import math
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, ClassVar, Literal

from llmopt.errors import FieldError, KeyUnknown, LlmoptError, naming, nearest


class Checked:
    """A dataclass whose values must fit their annotations: a wrong one raises FieldError when it is made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in fields(self):
            value = _typed(item.name, getattr(self, item.name), hints[item.name])
            object.__setattr__(self, item.name, value)
        self.check()

    def check(self) -> None:
        """Raise FieldError for a value that the types alone do not rule out."""


class Part(Checked):
    """A piece that a recipe can name: a frozen dataclass registered under `name`, its fields the recipe's keys."""

    name: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """The recipe entry that builds this instance: {name: fields}."""
        return {self.name: {f.name: _plain(getattr(self, f.name)) for f in fields(self)}}


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return value.to_dict()
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _typed(key: str, value: Any, hint: Any) -> Any:
    """`value` as the annotation of its field wants it; ints become floats, {name: fields} becomes a Part."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(key, value, args)
    if origin is Literal:
        if value not in args:
            raise FieldError(key, value, "one of " + ", ".join(map(str, args)))
        return value
    if isinstance(hint, type) and issubclass(hint, Part):
        return value if isinstance(value, hint) else _nested(key, value, hint)
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise FieldError(key, value, "a list")
        return origin(_typed(f"{key}[{i}]", v, args[0]) for i, v in enumerate(value))
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise FieldError(key, value, "a finite number")
    plain = origin or hint
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise FieldError(key, value, f"a value of type {plain.__name__}")
    return value


def _one_of(key: str, value: Any, hints: tuple) -> Any:
    if value is None and type(None) in hints:
        return None
    first: FieldError | None = None
    for hint in (h for h in hints if h is not type(None)):
        try:
            return _typed(key, value, hint)
        except FieldError as error:
            first = first or error
    raise first


def _nested(key: str, value: Any, base: type) -> "Part":
    if not isinstance(value, dict) or len(value) != 1:
        raise FieldError(key, value, "one method, as {family.method: {fields}}")
    (name, given), = value.items()
    made = build(name, given or {})
    if not isinstance(made, base):
        raise FieldError(key, name, f"a {base.__name__}")
    return made


FAMILIES = ("attention", "heads", "kv", "prune", "quant")          # the folders whose import registers their methods
_REGISTRY: dict[str, type[Part]] = {}


def _all() -> dict[str, type[Part]]:
    """The registry, with the methods of every family in it."""
    for family in FAMILIES:
        importlib.import_module(f"llmopt.{family}")
    return _REGISTRY


def register(name: str) -> Callable[[type], type]:
    """Class decorator: make a method known under its public name. A clash raises at import."""

    def enter(cls: type[Part]) -> type[Part]:
        if name in _REGISTRY:
            raise RuntimeError(f"two methods are called {name!r}: {_REGISTRY[name]} and {cls}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return enter


def get(name: str) -> type[Part]:
    """The class registered under `name`; an unknown name lists the nearest valid ones."""
    known = _all()
    if name not in known:
        raise LlmoptError(f"there is no method {name!r}{nearest(name, known)}")
    return known[name]


def names() -> list[str]:
    """Every registered method, sorted."""
    return sorted(_all())


def build(name: str, given: dict[str, Any]) -> Part:
    """An instance of the method `name`; raises LlmoptError naming an unknown, missing or unusable field."""
    cls = get(name)
    with naming(name):
        return fill(cls, given)


def fill(cls: type, given: dict[str, Any]) -> Any:
    """`cls(**given)` for a Checked dataclass, where an unknown or missing key is an error that names it."""
    known = {f.name: f for f in fields(cls)}
    for key in given:
        if key not in known:
            raise KeyUnknown(key, nearest(key, known))
    for key, item in known.items():
        if key not in given and item.default is MISSING and item.default_factory is MISSING:
            raise LlmoptError(f"the field {key!r} is missing")
    return cls(**given)
