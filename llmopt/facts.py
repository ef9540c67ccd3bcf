"""llmopt.json, what a checkpoint says about itself: read, and held against its shape before anybody trusts it."""
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmopt.folder import check_config, load_json, read_json
from llmopt.method import LlmoptError

FORMAT_VERSION = 1
FILE = "llmopt.json"
SIZE, COUNT, NUMBER = range(2**63), range(1, 2**63), int | float

# A shape is a type, a range of integers, [each item], (item, item), or {key: value}: `?` after a key that may be
# missing, `str` for the keys that are not named.
META = {"modules?": {str: {"bits": NUMBER, str: object}}, "shares?": [[NUMBER]], "bits?": NUMBER, str: object}
FACTS = {
    "format_version": COUNT, "versions": {"llmopt": str, str: str}, "base_model": str, "base_licence": str | None,
    "format": str, "bytes": SIZE, "loads_with": {"transformers": str, str: str}, "changes?": [str],
    "records?": [{"method": str, "fields": {str: object}, "meta": META}], "table?": [(str, str, str)],
    "scores?": {str: [(str, str, NUMBER)]}, str: object,
}
RUN = {"parameters": (COUNT, COUNT), "dense_bytes": SIZE, "predicted_bytes": int | None,
       "cache_bytes_per_token": (NUMBER, NUMBER), "records": list, str: object}       # what `llmopt compress` adds
LAYERS = {"per_layer_config?": {str: {str: object}}, str: object}


def read_facts(folder: Path) -> dict[str, Any]:
    """The llmopt.json of a checkpoint; raises LlmoptError for one that is missing, damaged or of a newer llmopt."""
    file = folder / FILE
    if folder.is_dir() and not file.exists():
        raise LlmoptError(f"{folder}: no {FILE}; this is not a checkpoint written by llmopt")
    facts = read_json(file)
    newest = facts.get("format_version", 0)
    if isinstance(newest, int) and newest > FORMAT_VERSION:
        raise LlmoptError(f"{file}: format_version {newest} is of a newer llmopt; this one reads {FORMAT_VERSION}")
    check_shape(facts, FACTS, str(file))
    return facts


def read_layers(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json, its per-layer shapes held against their form."""
    config = check_config(folder / "config.json")
    check_shape(config, LAYERS, str(folder / "config.json"))
    return config


def read_scores(file: Path) -> list[list[float]]:
    """Head scores [L][H] from a JSON file, {"scores": [L][H]} or the bare list; LlmoptError for anything else."""
    content = load_json(file)
    rows = content.get("scores") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, list) and all(map(_is_score, row)) for row in rows):
        raise LlmoptError(f'{file}: holds no head scores; expected {{"scores": [[...], ...]}} of finite numbers')
    return rows


def _is_score(value: Any) -> bool:
    return isinstance(value, NUMBER) and abs(value) < 1e30


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Raise LlmoptError naming the place, such as `llmopt.json: records.0.method`, where `value` has not its shape."""
    for path, found in _misfits(value, shape, ""):
        raise LlmoptError(f"{where}: {path.strip('.') or 'the file'} is {found}; damaged, or not written by llmopt")


def _misfits(value: Any, shape: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path, what is there) of every part of `value` that is not of its shape."""
    if isinstance(shape, range):
        fits = type(value) is int and value in shape
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
