"""The whole contract between llmopt and a method: two verbs, apply and restore.

A method is a frozen dataclass whose fields ARE the keys of its recipe entry. `apply` edits a model in place and
returns a `Record`; `restore` redoes the edit on a model that was loaded from disk.
"""
import difflib
import math
import time
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Literal

from torch import Tensor

from llmopt.ranks import Ranks
from llmopt.room import Room, Scene

Stage = Literal["score", "prune", "quant", "runtime"]
STAGES: tuple[Stage, ...] = typing.get_args(Stage)  # the order in which the steps of a recipe must come


LONGEST = 2000                 # characters of a message, a value or a list of choices included


def one_line(text: str) -> str:
    """`text` without line ends or terminal codes: names and values from foreign files may hold either."""
    line = " ".join(part.strip() for part in text.splitlines())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return line if len(line) <= LONGEST else f"{line[:LONGEST * 3 // 4]} ... {line[-LONGEST // 4:]}"


class LlmoptError(Exception):
    """Something the user can mend; its text is the whole message. Commands print it and exit with `exit_code`."""

    exit_code: ClassVar[int] = 2

    def __str__(self) -> str:
        return one_line(super().__str__())


class FieldError(LlmoptError):
    """A field of a method holds a value that it cannot use."""

    def __init__(self, key: str, value: object, expected: str):
        super().__init__(f"{key}: {value!r} given, {expected} expected")
        self.key = key


class KeyUnknown(LlmoptError):
    """A key that its place does not have."""

    def __init__(self, key: str, tail: str):
        super().__init__(f"unknown key {key!r}{tail}")
        self.key = key


class BudgetError(LlmoptError):
    """A total that no allocation can meet."""


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Put `where` in front of any short fact that is raised inside."""
    try:
        yield
    except LlmoptError as fact:
        raise LlmoptError(f"{where}: {fact}") from fact


def nearest(word: str, choices: Iterable[str]) -> str:
    """A tail for error messages: the closest valid choice, then all of them."""
    choices = sorted(choices)
    if not choices:
        return "; there are none"
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{hint}. Choices: {', '.join(choices)}"


Progress = Callable[[Iterable, str], Iterable]


def silent(items: Iterable, label: str) -> Iterable:
    """The progress that shows nothing."""
    return items


class Clock:
    """A Progress that tells from the first item of every loop how many seconds all its items will take."""

    def __init__(self, progress: Progress = silent):
        self.progress, self.seconds = progress, 0.0

    def __call__(self, items: Iterable, label: str) -> Iterator:
        items = list(items)
        start = time.perf_counter()
        for i, item in enumerate(self.progress(items, label)):
            if i == 1:
                self.seconds += (time.perf_counter() - start) * len(items)
            yield item
        if len(items) == 1:
            self.seconds += time.perf_counter() - start


@dataclass
class Record:
    """All that load time needs of one step: plain JSON data and tensors."""

    meta: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Memory:
    """Where the weights are while steps run: all in memory. llmopt.stream brings in one block at a time instead."""

    def begin(self, step: int) -> None:
        """The step that is about to run."""

    @property
    def reading(self) -> "Memory":
        """The same for a loop that changes no weight: what a block became is not kept."""
        return self

    def editing(self, again: bool = False) -> "Memory":
        """The same for one loop that changes blocks; again: so cheap that a resumed run does it again."""
        return self

    def remember(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `compute` gives, plain JSON data; computed once, even if the run is cut off and resumed."""
        return compute()

    def restored(self, model, index: int) -> bool:
        """Whether a run that was cut off had done this loop's work on a block, which is then in place."""
        return False

    @contextmanager
    def outside(self, model) -> Iterator[None]:
        """Inside, the weights of the decoder that belong to no block can be used."""
        yield

    @contextmanager
    def block(self, model, index: int) -> Iterator[None]:
        """Inside, the weights of one block can be used and changed."""
        yield

    def keeper(self) -> Callable[[Tensor], Tensor]:
        """What turns tensors into the same ones, to be held until the caller drops them; it has a room of its own."""
        return lambda tensor: tensor

    def keep(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The tensors, held until the list is dropped."""
        return [*map(self.keeper(), tensors)]


@dataclass
class Run:
    """What a step may look at while it is applied.

    batches: [{"input_ids": [B, T], "attention_mask": [B, T]}, ...], right-padded, or None.
    scores: head scores by step name: L tensors of [H_l], float32.
    multiple: pruned widths are rounded to this many channels, so that a later quantization step fits.
    memory: go through the blocks with walk.each and walk.visits, which bring in their weights.
    ranks: the processes that share this run. A step must leave the same model and record on all of them.
    """

    batches: list[dict[str, Tensor]] | None = None
    scores: dict[str, list[Tensor]] = field(default_factory=dict)
    seed: int = 0
    progress: Progress = silent
    multiple: int = 1
    tokenizer: Any = None
    memory: Memory = field(default_factory=Memory)
    ranks: Ranks = field(default_factory=Ranks)

    @cached_property
    def own_batches(self) -> list[dict[str, Tensor]]:
        """This process's part of the batches: what is summed over them must be summed over the ranks, counts too."""
        return self.ranks.share_batches(self.batches)


@dataclass(frozen=True)
class Pace:
    """What estimates of time multiply with: the model's blocks, seconds of its whole forward per token."""

    blocks: int
    token: float


def timed(do: Callable, *given: Any) -> float:
    """Seconds that `do(*given)` takes."""
    start = time.perf_counter()
    do(*given)
    return time.perf_counter() - start


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


class Method(Checked, ABC):
    """One entry of a recipe. Subclasses are frozen dataclasses registered under `family.method`."""

    name: ClassVar[str]
    stage: ClassVar[Stage]
    needs_data: ClassVar[bool] = False
    needs_whole: ClassVar[bool] = False     # True: all weights at once, so that it cannot run block by block

    def whole_bytes(self, model, tokens: int) -> int:
        """Bytes beside the weights that a step which needs_whole takes at least, for batches of so many tokens.

        model: may be a skeleton.
        """
        return 0

    @abstractmethod
    def apply(self, model, run: Run) -> Record:
        """Edit `model` in place and return what load time needs."""

    def rooms(self, model, scene: Scene) -> list[Room]:
        """What `apply` takes of the memory, an entry for each block or for what it does at once; shapes are enough."""
        rows, length = scene.largest
        return [Room(whole=self.whole_bytes(model, rows * length))]

    def seconds(self, model, run: Run, pace: "Pace") -> float:
        """How long `apply` will take; `model` is cut to its first block, except for a score that needs all of it."""
        return timed(self.apply, model, run) * pace.blocks

    def restore(self, model, record: Record) -> None:
        """Redo the edit on a model loaded from disk; nothing, where config and weights already carry it."""

    def to_dict(self) -> dict[str, Any]:
        """The recipe entry that builds this instance: {name: fields}."""
        return {self.name: {f.name: _plain(getattr(self, f.name)) for f in fields(self)}}


def _plain(value: Any) -> Any:
    if isinstance(value, Method):
        return value.to_dict()
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _typed(key: str, value: Any, hint: Any) -> Any:
    """`value` as the annotation of its field wants it; ints become floats, {name: fields} becomes a Method."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(key, value, args)
    if origin is Literal:
        if value not in args:
            raise FieldError(key, value, "one of " + ", ".join(map(str, args)))
        return value
    if isinstance(hint, type) and issubclass(hint, Method):
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


def _nested(key: str, value: Any, base: type) -> "Method":
    if not isinstance(value, dict) or len(value) != 1:
        raise FieldError(key, value, "one method, as {family.method: {fields}}")
    (name, given), = value.items()
    made = build(name, given or {})
    if not isinstance(made, base):
        raise FieldError(key, name, f"a {base.__name__}")
    return made


_REGISTRY: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type], type]:
    """Class decorator: make a method known under its public name. A clash raises at import."""

    def enter(cls: type[Method]) -> type[Method]:
        if name in _REGISTRY:
            raise RuntimeError(f"two methods are called {name!r}: {_REGISTRY[name]} and {cls}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return enter


def get(name: str) -> type[Method]:
    """The class registered under `name`; an unknown name lists the nearest valid ones."""
    if name not in _REGISTRY:
        raise LlmoptError(f"there is no method {name!r}{nearest(name, _REGISTRY)}")
    return _REGISTRY[name]


def names() -> list[str]:
    """Every registered method, sorted."""
    return sorted(_REGISTRY)


def build(name: str, given: dict[str, Any]) -> Method:
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
