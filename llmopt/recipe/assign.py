"""`--set KEY=VALUE`: the value of a recipe that a key means, and the change to it.

A key is a path such as data.samples or steps.1.bits. A step is called by its number, its method (steps.quant.gptq.bits)
or the last word of that (steps.gptq.bits); a field alone (bits) is enough where one step, else one section, has it.
"""
import difflib
from collections.abc import Iterator
from typing import Any

from llmopt.errors import LlmoptError, closest, naming
from llmopt.parts import fields_of, get, names
from llmopt.recipe.yaml_lines import read_yaml
from llmopt.specs import SECTIONS

PLAIN = ("format", "seed", "max_shard_size")
KEYS = (*SECTIONS, "steps", *PLAIN)


def assign(data: dict[str, Any], assignment: str) -> str:
    """Apply "steps.gptq.bits=3" to a recipe's data; returns it with the key written out, "steps.1.bits=3"."""
    key, sign, value = assignment.partition("=")
    if not sign:
        raise LlmoptError(f"--set {assignment}: KEY=VALUE expected, such as steps.1.bits=3")
    with naming(f"--set {assignment}"):
        path = whole_key(data, key)
        _put(data, path, read_yaml(value, "value")[0])
    return f"{'.'.join(path)}={value}"


def values(sets: tuple[str, ...]) -> dict[str, Any]:
    """{"window": 8} from ("window=8",), for the commands that take one method."""
    made = {}
    for given in sets:
        field, sign, value = given.partition("=")
        if not sign:
            raise LlmoptError(f"--set {given}: FIELD=VALUE expected")
        with naming(f"--set {given}"):
            made[field] = read_yaml(value, "value")[0]
    return made


def whole_key(data: dict[str, Any], key: str) -> list[str]:
    """The words of the path that `key` means in this recipe; raises LlmoptError for none, and for several."""
    first, *rest = words = key.split(".")
    steps = methods(data)
    if first == "steps" and rest:
        return ["steps", *_numbered(steps, rest)]
    if first in KEYS:
        return words
    if rest and (called := _called(steps, words)):
        return ["steps", *_numbered(steps, words, called)]
    places = [i for i, name in enumerate(steps) if first in _fields(name)]
    sections = [section for section, cls in SECTIONS.items() if first in fields_of(cls)]
    if len(places or sections) > 1:
        full = [f"steps.{_label(steps, i)}.{first}" for i in places] or [f"{section}.{first}" for section in sections]
        raise LlmoptError(f"{first!r} is ambiguous: {' or '.join(full)}")
    if not places and not sections:
        raise LlmoptError(f"unknown key {key!r}{_nearest_keys(key, steps)}")
    return ["steps", str(places[0]), *words] if places else [sections[0], *words]


def methods(data: dict[str, Any]) -> list[str]:
    """The method of each step of a recipe's data; nothing in place of one that is not written as a step."""
    steps = data.get("steps")
    entries = [list(step) if isinstance(step, dict) else [step] for step in (steps if isinstance(steps, list) else [])]
    return [entry[0] if len(entry) == 1 and isinstance(entry[0], str) else "" for entry in entries]


def _called(steps: list[str], words: list[str]) -> list[int]:
    """The numbers of the steps that the first word, or the first two, call."""
    full, last = ".".join(words[:2]), f".{words[0]}"
    return [i for i, name in enumerate(steps) if name and (name == full or name.endswith(last))]


def _numbered(steps: list[str], words: list[str], called: list[int] | None = None) -> list[str]:
    """`words` behind `steps.`, the step as a number."""
    if words[0] in map(str, range(len(steps))):
        return words
    called = _called(steps, words) if called is None else called
    if len(called) > 1:
        raise LlmoptError(f"{words[0]!r} is ambiguous: {', '.join(f'steps.{i} is {steps[i]}' for i in called)}")
    if not called:
        known = ", ".join(f"{i} {name}" for i, name in enumerate(steps))
        raise LlmoptError(f"there is no step {words[0]}"
                          f"{closest(words[0], [name.rpartition('.')[2] for name in steps])}; there are: {known}")
    i, = called
    return [str(i), *words[2 if steps[i] == ".".join(words[:2]) else 1:]]


def _fields(method: str) -> dict[str, Any]:
    return fields_of(get(method)) if method in names() else {}


def _label(steps: list[str], index: int) -> str:
    """The shortest word that calls a step: the last of its method's name, or its number."""
    lasts = [name.rpartition(".")[2] for name in steps]
    return lasts[index] if lasts.count(lasts[index]) == 1 else str(index)


def _nearest_keys(key: str, steps: list[str]) -> str:
    """A tail for an error: every key of the recipe, written out, the most alike first."""
    last = key.rpartition(".")[2]

    def alike(known: str) -> float:
        return -difflib.SequenceMatcher(None, last, known.rpartition(".")[2]).ratio()

    return f". Keys: {', '.join(sorted(_all_keys(steps), key=alike))}"


def _all_keys(steps: list[str]) -> Iterator[str]:
    for i, name in enumerate(steps):
        yield from (f"steps.{_label(steps, i)}.{field}" for field in _fields(name))
    for section, cls in SECTIONS.items():
        yield from (f"{section}.{field}" for field in fields_of(cls))
    yield from PLAIN


def _put(data: dict[str, Any], path: list[str], value: Any) -> None:
    """Set the value at `path`; the words behind a step's number are fields of its method."""
    target: Any = data
    *parents, last = path
    for i, word in enumerate(parents):
        if i == 1 and parents[0] == "steps":
            target = _step(target, word)
        else:
            target = _descend(target, word)
    if not isinstance(target, (dict, list)):
        raise LlmoptError(f"{'.'.join(parents)} has no keys")
    if isinstance(target, list):
        _descend(target, last)
    target[int(last) if isinstance(target, list) else last] = value


def _step(steps: Any, word: str) -> Any:
    """The fields of a step; one that is written as a bare name gets some."""
    step = _descend(steps, word)
    if isinstance(step, str):
        step = steps[int(word)] = {step: {}}
    if not isinstance(step, dict) or len(step) != 1:
        raise LlmoptError(f"step {word} is not written as {{family.method: {{fields}}}}")
    name, = step
    return _descend(step, name)


def _descend(target: Any, word: str) -> Any:
    """The value under `word`; a mapping that is missing, or written as null, is made."""
    if isinstance(target, list):
        if word not in map(str, range(len(target))):
            raise LlmoptError(f"there is no step {word}; steps run from 0 to {len(target) - 1}")
        return target[int(word)]
    if not isinstance(target, dict):
        raise LlmoptError(f"nothing below {word!r}")
    if target.get(word) is None:
        target[word] = {}
    return target[word]
