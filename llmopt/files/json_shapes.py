"""Whether JSON data has the shape that is expected of it."""
from collections.abc import Iterator
from typing import Any

from llmopt.errors import LlmoptError

SIZE, COUNT, NUMBER = range(2**63), range(1, 2**63), int | float


def finite(value: Any) -> bool:
    """True for a number to compute with: no NaN, no infinity, no bool."""
    return type(value) in (int, float) and abs(value) < 1e30


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Raise LlmoptError naming the place, such as `llmopt.json: records.0.method`, where `value` has not its shape."""
    for path, found in _misfits(value, shape, ""):
        raise LlmoptError(f"{where}: {path.strip('.') or 'the file'} is {found}; damaged, or not written by llmopt")


def _misfits(value: Any, shape: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path, what is there) of every part of `value` that is not of its shape."""
    if isinstance(shape, range):
        fits = type(value) is int and value in shape
    elif shape is finite:
        fits = finite(value)
    elif isinstance(shape, (dict, list, tuple)):
        kind = dict if isinstance(shape, dict) else list
        fits = isinstance(value, kind) and (not isinstance(shape, tuple) or len(value) == len(shape))
    else:
        fits = isinstance(value, shape) and not (isinstance(value, int) and abs(value) >= 2**63)
    if not fits:
        yield path, f"{str(value)[:80]!r}"
        return
    if isinstance(shape, dict):
        yield from _misfits_of_mapping(value, shape, path)
    elif isinstance(shape, (list, tuple)):
        for i, item in enumerate(value):
            yield from _misfits(item, shape[i % len(shape)], f"{path}.{i}")


def _misfits_of_mapping(value: dict[str, Any], shape: dict, path: str) -> Iterator[tuple[str, str]]:
    named = {key.rstrip("?"): item for key, item in shape.items() if key is not str}
    for key in (key for key in shape if key is not str and not key.endswith("?") and key not in value):
        yield f"{path}.{key}", "missing"
    for key, item in value.items():
        if key in named or str in shape:
            yield from _misfits(item, named.get(key, shape.get(str)), f"{path}.{key}")
