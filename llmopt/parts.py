"""Named pieces with checked fields, and the registry of those that a recipe can name.

A piece is a frozen pydantic dataclass. A field is declared once, `bits: int = Field(4, ge=2, le=8, description="...")`:
type, bounds and meaning are what errors, `help()`, `llmopt methods` and `llmopt schema` tell of it.
"""
import functools
import importlib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, ValidationError
from pydantic.dataclasses import is_pydantic_dataclass
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, core_schema
from typing_extensions import is_typeddict

from llmopt.errors import FieldError, KeyUnknown, LlmoptError, closest, naming, nearest

T = TypeVar("T")
Several = Annotated[tuple[T, ...], BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given)]
GAP = "x-llmopt-piece"         # marks where a JSON Schema names [kind, *choices]
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Any: "a value"}


class Checked:
    """A pydantic dataclass whose values must fit their annotations, strictly: True is no int, "3" no number.

    Decorated with `in_our_words`, as `register` does, a wrong value raises FieldError when the instance is made, an
    unknown keyword KeyUnknown.
    """

    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise FieldError for a value that types and bounds do not rule out."""


def in_our_words(cls: type[T]) -> type[T]:
    """Class decorator above pydantic's `dataclass`: errors of making an instance are LlmoptErrors, not pydantic's."""
    make = cls.__init__

    @functools.wraps(make)
    def __init__(self, *args: Any, **fields: Any) -> None:
        try:
            make(self, *args, **fields)
        except ValidationError as error:
            raise _first_fact(cls, error) from None

    if not hasattr(make, "__wrapped__"):
        cls.__init__ = __init__
    return cls


class Part(Checked):
    """A piece that a recipe can name: `NAME`, or `{NAME: fields}` where a field differs from its default.

    A subclass with a `kind` of its own opens a registry; a field annotated with it takes an instance or such an entry.
    """

    kind: ClassVar[str]           # the word for such a piece in messages
    name: ClassVar[str]
    about: ClassVar[str]          # its docstring as it was written; in `__doc__` the fields follow

    def to_dict(self) -> dict[str, Any]:
        """The entry that builds this instance, with every field: {name: fields}."""
        return {self.name: {key: plain(getattr(self, key)) for key in fields_of(self)}}

    @classmethod
    def of(cls, given: Any) -> "Part":
        """`given` itself if it is such a piece, else the one that a name or {name: fields} describes."""
        if isinstance(given, cls):
            return given
        name, values = next(iter(given.items())) if isinstance(given, dict) and len(given) == 1 else (given, None)
        if not isinstance(name, str) or not isinstance(values, dict | None):
            raise FieldError("", given, f"one {cls.kind}, as NAME or {{NAME: {{fields}}}}")
        if name not in choices(cls):
            raise FieldError("", name, wanted(cls), closest(name, choices(cls)))
        try:
            return get(name, cls.kind)(**values or {})
        except FieldError as error:
            raise error.below(name) from None
        except LlmoptError as error:
            raise LlmoptError(f"{name}: {error}") from None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        """How pydantic checks a field of this type; while it makes the class itself, that class's own fields."""
        if cls.__dict__.get("__pydantic_complete__") is False:
            return handler(source)
        return core_schema.no_info_plain_validator_function(lambda given: _named(cls, given))

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: Any) -> dict[str, Any]:
        """In JSON Schema a field of this type is a gap that recipe/schema.py fills with the pieces to choose from."""
        return {GAP: [cls.kind, *choices(cls)]} if schema["type"] == "function-plain" else handler(schema)


def _named(cls: type[Part], given: Any) -> Part:
    try:
        return cls.of(given)
    except LlmoptError as error:          # pydantic adds the name of the field
        raise PydanticCustomError("part", "{fact}", {"fact": error}) from None


def plain(value: Any) -> Any:
    """A field's value as a recipe writes it; a piece with all its defaults is its name."""
    if isinstance(value, Part):
        usual = all(getattr(value, key) == default_of(item) for key, item in fields_of(value).items())
        return value.name if usual else value.to_dict()
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------------------------------------------------- registry

# folders whose import registers methods
FAMILIES = ("attention", "experts", "heads", "kv", "prune", "quant", "transform")
_REGISTRY: dict[str, dict[str, type[Part]]] = {}          # kind -> name -> class


def _known(kind: str) -> dict[str, type[Part]]:
    """The registered pieces of a kind by name; the methods of every family, whether it has been imported or not."""
    if kind == "method":
        for family in FAMILIES:
            importlib.import_module(f"llmopt.{family}")
    return _REGISTRY.get(kind, {})


def register(name: str) -> Callable[[type], type]:
    """Class decorator: make a piece known under its public name. A clash raises at import."""

    def enter(cls: type[Part]) -> type[Part]:
        known = _REGISTRY.setdefault(cls.kind, {})
        if name in known:
            raise RuntimeError(f"two pieces of the kind {cls.kind} are called {name!r}: {known[name]} and {cls}")
        if not is_pydantic_dataclass(cls):
            raise RuntimeError(f"{cls} is no pydantic dataclass: decorate it with pydantic.dataclasses.dataclass")
        cls.name, cls.about = name, (cls.__doc__ or "").rstrip()
        known[name] = in_our_words(cls)
        holders = [other for of_kind in _REGISTRY.values() for other in of_kind.values() if cls.kind in _held(other)]
        for told in (cls, *holders):
            told.__doc__ = _with_fields(told)
        return cls

    return enter


def get(name: str, kind: str = "method") -> type[Part]:
    """The class registered under `name`; an unknown name lists the nearest valid ones."""
    known = _known(kind)
    if name not in known:
        raise LlmoptError(f"there is no {kind} {name!r}{nearest(name, known)}")
    return known[name]


def names(kind: str = "method") -> list[str]:
    """Every registered piece of a kind, sorted; by default every method."""
    return sorted(_known(kind))


def choices(base: type[Part]) -> list[str]:
    """The names that a field of the type `base` takes."""
    return sorted(name for name, cls in _known(base.kind).items() if issubclass(cls, base))


def elsewhere(word: str, public: Iterable[str]) -> str:
    """A tail for the error about a name that llmopt does not have: where a method of that name is, or what is meant."""
    for cls in _known("method").values():
        if word.lower() in (cls.__name__.lower(), f"{cls.__name__}Modifier".lower(), f"{cls.__name__}Config".lower()):
            return f"; it is llmopt.{cls.name.partition('.')[0]}.{cls.__name__}"
    return closest(word, public)


def build(name: str, given: dict[str, Any]) -> Part:
    """An instance of the method `name`; raises LlmoptError naming an unknown, missing or unusable field."""
    cls = get(name)
    with naming(name):
        return cls(**given)


# --------------------------------------------------------------------------------------- what fields say of themselves

def fields_of(cls: Any) -> dict[str, FieldInfo]:
    """The fields of a Checked class or instance, by name, as pydantic knows them."""
    return cls.__pydantic_fields__


def wanted(hint: Any, metadata: Any = ()) -> str:
    """The values of an annotation in words: `a number at least 0 and below 1, or null`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return wanted(args[0], (*metadata, *_flat(args[1:])))
    if origin in (typing.Union, types.UnionType):
        some = [arg for arg in args if arg is not type(None) and (arg is not int or float not in args)]
        return ", or ".join([wanted(arg, metadata) for arg in some] + ["null"] * (type(None) in args))
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if origin in (list, tuple):
        return f"a list, each item {wanted(args[0])}"
    if isinstance(hint, type) and issubclass(hint, Part):
        return "one of " + ", ".join(choices(hint))
    if is_typeddict(hint):
        return f"a mapping of {', '.join(hint.__annotations__)}"
    return WORDS.get(origin or hint, "a mapping") + _bounds(metadata)


def _flat(metadata: Any) -> Iterator[Any]:
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else [item]


def _bounds(metadata: Any) -> str:
    """` from 1 to 8` or ` at least 0 and below 1`."""
    found = {key: getattr(item, key) for item in metadata for key in ("ge", "gt", "le", "lt") if hasattr(item, key)}
    if {"ge", "le"} <= found.keys():
        return f" from {found['ge']} to {found['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " and".join(f" {words[key]} {bound}" for key, bound in found.items())


def field_lines(cls: type[Checked], around: tuple[str, ...] = ()) -> Iterator[tuple[str, str, str, str]]:
    """(field, values it takes, default, meaning) of every field, those of named pieces behind the field for them.

    around: the kinds of the pieces that this one lies in; what they may hold has been told.
    """
    for key, item in fields_of(cls).items():
        default = "(needed)" if item.is_required() else _as_text(default_of(item))
        yield key, wanted(item.annotation, item.metadata), default, item.description or ""
        for hint in (hint for hint in _pieces(item) if hint.kind not in around):
            for name in choices(hint):
                for inner, *rest in field_lines(get(name, hint.kind), (*around, hint.kind)):
                    yield (f"{key}.{name}.{inner}", *rest)


def _pieces(item: FieldInfo) -> list[type[Part]]:
    """The types of named pieces that a field takes."""
    hints = (item.annotation, *typing.get_args(item.annotation))
    return [hint for hint in hints if isinstance(hint, type) and issubclass(hint, Part)]


def _held(cls: type[Part]) -> set[str]:
    """The kinds of pieces that the fields of `cls` take."""
    return {hint.kind for item in fields_of(cls).values() for hint in _pieces(item)}


def default_of(item: FieldInfo) -> Any:
    """A field's default; PydanticUndefined where one is needed."""
    return item.get_default(call_default_factory=True)


def _as_text(value: Any) -> str:
    """A default as a recipe writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(plain(value))


def _with_fields(cls: type[Part]) -> str:
    """The docstring of a registered piece and its fields, for `help()`."""
    told = [f"    {key}: {about} ({values}; default {default})" for key, values, default, about in field_lines(cls)]
    return "\n".join([cls.about, "", "Fields:", *told]) if told else cls.about


# ------------------------------------------------------------------------------------- pydantic's errors in our words

def _first_fact(cls: type[Checked], error: ValidationError) -> LlmoptError:
    """The most telling of pydantic's errors: an unknown key, a missing one, else the first value that does not fit."""
    found = error.errors(include_url=False)
    order = ["unexpected_keyword_argument", "extra_forbidden", "missing"]
    fact = min(found, key=lambda e: order.index(e["type"]) if e["type"] in order else len(order))
    if isinstance(own := fact.get("ctx", {}).get("error"), LlmoptError):        # of `check`
        return own
    if not fact["loc"]:                             # no text at all, such as half of a character
        return KeyUnknown(str(fact["input"]), nearest(str(fact["input"]), fields_of(cls)))
    place, hint, metadata = _place(cls, fact["loc"])
    if fact["type"] in order[:2]:
        known = fields_of(cls) if len(fact["loc"]) == 1 else hint.__annotations__
        return KeyUnknown(place, nearest(str(fact["loc"][-1]), known))
    if fact["type"] == "missing":
        return LlmoptError(f"the field {place!r} is missing")
    inner = fact.get("ctx", {}).get("fact")
    if isinstance(inner, FieldError):
        return inner.below(place)
    if isinstance(inner, LlmoptError):
        return LlmoptError(f"{place}.{inner}")
    given = fact["input"]
    if isinstance(given, float) and not math.isfinite(given):
        return FieldError(place, given, "a finite number")
    return FieldError(place, given, wanted(hint, metadata), _hint(given, hint) if isinstance(given, str) else "")


def _hint(given: str, hint: Any) -> str:
    """A tail for text where something else is expected: the word that was meant, or the number."""
    inside = typing.get_args(hint)
    inside = (*inside, *(word for part in inside for word in typing.get_args(part)))
    if re.fullmatch(r"-?\d+(\.\d+)?", given) and {int, float} & {hint, *inside}:
        return f"; without quotes: {given}"
    return closest(given, inside)


def _place(cls: type[Checked], loc: tuple[int | str, ...]) -> tuple[str, Any, Any]:
    """(key, annotation, metadata) of the value at pydantic's `loc`: widths[1], overrides.q_proj.bits."""
    item = fields_of(cls).get(loc[0])
    if item is None:
        return str(loc[0]), Any, ()
    key, hint, metadata = str(loc[0]), item.annotation, item.metadata
    for step in loc[1:]:
        hint = next((arg for arg in typing.get_args(hint) if is_typeddict(arg)), hint)      # or null
        origin, inside = typing.get_origin(hint), typing.get_args(hint)
        if origin in (list, tuple):
            key, hint = f"{key}[{step}]", inside[0]
        elif origin is dict:
            key, hint = f"{key}.{step}", inside[1]
        elif is_typeddict(hint):
            key, hint = f"{key}.{step}", hint.__annotations__.get(step, hint)
        else:
            break                                   # the name of one choice among several
    return key, hint, metadata if len(loc) == 1 else ()
