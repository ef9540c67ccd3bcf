"""The text of a recipe -> a frozen Recipe. Every error names file, line and key, and the nearest valid choice."""
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmopt.errors import FieldError, LlmoptError, nearest
from llmopt.files.packaged import PACKAGED, recipes
from llmopt.files.shards import LARGEST
from llmopt.method import STAGES, Method
from llmopt.parts import Checked, build, in_our_words
from llmopt.recipe.assign import KEYS, PLAIN, assign
from llmopt.recipe.yaml_lines import MAX_BYTES, KeyPath, read_yaml
from llmopt.specs import MAX_SEED, SECTIONS, DataSpec, EvalSpec, ModelSpec

SIZE = r"0*[1-9]\d*(\.\d+)?\s*([KMGT]i?)?B"         # not zero


@in_our_words
@dataclass(frozen=True)
class Recipe(Checked):
    """Everything one run of `llmopt compress` is told."""

    model: ModelSpec = Field(ModelSpec(), description="which model is compressed")
    data: DataSpec = Field(DataSpec(), description="calibration data")
    steps: tuple[Method, ...] = Field((), description=f"methods, in the order {' -> '.join(STAGES)}")
    eval: EvalSpec = Field(default_factory=EvalSpec, description="tasks that score the dense and the compressed model")
    format: Literal["portable", "dense"] = Field("portable", description="dense: rounded weights in the model's type")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="of every random draw")
    max_shard_size: str = Field(LARGEST, description="largest file of weights, such as 2GB",
                                json_schema_extra={"pattern": f"^{SIZE}$"})
    changes: tuple[str, ...] = ()        # the words of the command that changed it: --model NAME --set KEY=VALUE

    def check(self) -> None:
        object.__setattr__(self, "data", self.data.of(self.model.id))       # frozen; what was used is written down
        if not re.fullmatch(SIZE, self.max_shard_size):
            raise FieldError("max_shard_size", self.max_shard_size, "a size such as 2GB")

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out."""
        return {"model": asdict(self.model), "data": asdict(self.data), "steps": [s.to_dict() for s in self.steps],
                "eval": asdict(self.eval), "format": self.format, "seed": self.seed,
                "max_shard_size": self.max_shard_size}


def load(name: str, sets: tuple[str, ...] = (), model: str | None = None, trust_remote_code: bool = False) -> Recipe:
    """Read a recipe by path or by packaged name; `sets` are "steps.1.bits=3" overrides, `model` replaces model.id.

    trust_remote_code: let code that comes with the model, or with tasks of its own files, run. No recipe can say so.
    """
    path = find(name)
    if path.stat().st_size > 4 * MAX_BYTES:            # a character takes up to 4
        raise LlmoptError(f"{path}: {path.stat().st_size:,} bytes are too many for a recipe")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LlmoptError(f"{path}: not UTF-8 text (byte {error.start})") from error
    return parse(text, str(path), sets, model, trust_remote_code)


def find(name: str) -> Path:
    """The recipe's file: `name` as a path, else NAME.yaml in the checkout's or the wheel's recipes."""
    given = Path(name).expanduser()
    if given.is_file():
        return given
    for folder in PACKAGED:
        packaged = folder / f"{name.removesuffix('.yaml')}.yaml"
        if packaged.is_file():
            return packaged
    raise LlmoptError(f"there is no recipe {name!r}: neither a file nor a packaged recipe{nearest(name, recipes())}")


def parse(text: str, source: str, sets: tuple[str, ...] = (), model: str | None = None,
          trust_remote_code: bool = False) -> Recipe:
    """Build a Recipe from YAML text; `source` names it in errors."""
    data, lines = read_yaml(text, source)
    data, where = {} if data is None else data, Where(source, lines)
    if not isinstance(data, dict):
        raise LlmoptError(f"{source}:1: a recipe is a mapping with the keys {', '.join(KEYS)}")
    changes = [word for given in sets for word in ("--set", assign(data, given))]
    if model is not None:
        data["model"] = _model_section(where, data) | {"id": model}
        changes = ["--model", model, *changes]
    return _recipe(data, where, changes, trust_remote_code)


def from_data(data: dict[str, Any], trust_remote_code: bool = False) -> Recipe:
    """Build a Recipe from plain data, as YAML would hold it; errors name the key, as there is no line."""
    return _recipe(data, Where("", {}), [], trust_remote_code)


def _recipe(data: dict[str, Any], where: "Where", changes: list[str], trust_remote_code: bool) -> Recipe:
    if trust_remote_code:
        data = data | {"model": _model_section(where, data) | {"trust_remote_code": True}}
        changes = ["--trust-remote-code", *changes]
    elif isinstance(data.get("model"), dict) and data["model"].get("trust_remote_code"):
        raise where.error(("model", "trust_remote_code"), "model.trust_remote_code: a recipe cannot let code run; read "
                          "the model's code, and if you trust it give --trust-remote-code on the command line")
    for key in data:
        if key not in KEYS:
            raise where.error((key,), f"unknown key {key!r}{nearest(key, KEYS)}")
    parts = {key: _section(where, key, data.get(key)) for key in SECTIONS}
    parts |= {key: data[key] for key in PLAIN if key in data}
    parts |= {"steps": _steps(where, data.get("steps")), "changes": tuple(changes)}
    return _filled(where, (), "", lambda: Recipe(**parts))


def _model_section(where: "Where", data: dict[str, Any]) -> dict[str, Any]:
    given = data.get("model") or {}
    if not isinstance(given, dict):
        raise where.error(("model",), "a mapping such as {id: NAME} expected")
    return given


@dataclass(frozen=True)
class Where:
    """Turns a key path into FILE:LINE for messages; source "": there is no file, so a message stands alone."""

    source: str
    lines: dict[KeyPath, int]

    def error(self, path: KeyPath, fact: str, key: str = "") -> LlmoptError:
        """An error at the line of `path`, or of the deepest place below it on the way to `key` (of a FieldError)."""
        if not self.source:
            return LlmoptError(fact)
        probe = path
        while probe and probe not in self.lines:
            probe = probe[:-1]
        below = [place for place in self.lines if place[:len(path)] == path and _leads(place[len(path):], key)]
        return LlmoptError(f"{self.source}:{self.lines.get(max(below, key=len, default=probe), 1)}: {fact}")


def _leads(place: KeyPath, key: str) -> bool:
    """True if a place such as ("widths", 1) lies on the way to a key such as `widths[1]` or `overrides.q_proj.bits`."""
    dotted = ".".join(map(str, place))
    key = key.replace("[", ".").replace("]", "")
    return f"{key}.".startswith(f"{dotted}.")


def _section(where: Where, key: str, given: Any) -> Any:
    if given is None:
        return SECTIONS[key]()
    if not isinstance(given, dict):
        raise where.error((key,), f"{key}: a mapping expected, {given!r} given")
    return _filled(where, (key,), key, lambda: SECTIONS[key](**given))


def _steps(where: Where, given: Any) -> tuple[Method, ...]:
    if not isinstance(given, list) or not given:
        raise where.error(("steps",), "steps: a list with at least one {family.method: {fields}} expected")
    steps = []
    for i, entry in enumerate(given):
        if isinstance(entry, str):
            entry = {entry: {}}
        if not isinstance(entry, dict) or len(entry) != 1:
            raise where.error(("steps", i), f"steps.{i}: one {{family.method: {{fields}}}} expected, {entry!r} given")
        (name, fields_given), = entry.items()
        if fields_given is not None and not isinstance(fields_given, dict):
            raise where.error(("steps", i, name), f"{name}: a mapping of fields expected, {fields_given!r} given")
        scored = [step.name for step in steps if step.stage == "score"]
        steps.append(_filled(where, ("steps", i, name), "",
                             lambda n=name, f=fields_given, s=scored: check_asked(build(str(n), f or {}), s)))
    try:
        check_order(tuple(steps))
    except LlmoptError as fact:
        raise where.error(("steps",), str(fact)) from fact
    return tuple(steps)


def _filled(where: Where, path: KeyPath, label: str, make) -> Any:
    prefix = f"{label}: " if label else ""
    try:
        return make()
    except LlmoptError as fact:
        cause = fact.__cause__ if isinstance(fact.__cause__, FieldError) else fact
        key = cause.key if isinstance(cause, FieldError) else ""
        raise where.error(path, f"{prefix}{fact}", key) from fact


def check_order(steps: tuple[Method, ...]) -> None:
    """Raise LlmoptError unless stages come in order, score steps before who asks for them, no two in the same place."""
    for before, after in zip(steps, steps[1:], strict=False):
        if STAGES.index(after.stage) < STAGES.index(before.stage):
            raise LlmoptError(f"{after.name} must come before {before.name}: the order is {' -> '.join(STAGES)}")
    for i, step in enumerate(steps):
        check_asked(step, [before.name for before in steps[:i] if before.stage == "score"])
    for place, members in _places(steps).items():
        if len(members) > 1:
            raise LlmoptError(f"at most one {place} in a recipe, found {' and '.join(members)}")


def check_asked(step: Method, scored: Sequence[str]) -> Method:
    """The step; raises LlmoptError for a score step that it asks for and that is not among those before it."""
    for name in step.asks:
        if not any(f"{name}.".startswith(f"{before}.") for before in scored):
            raise LlmoptError(f"{step.name} needs the step {name} before it{nearest(name, scored) if scored else ''}")
    return step


def _places(steps: tuple[Method, ...]) -> dict[str, list[str]]:
    places: dict[str, list[str]] = {}
    for step in steps:
        if step.place:
            places.setdefault(step.place, []).append(step.name)
    return places
