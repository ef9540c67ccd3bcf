"""What a checkpoint says of the machine it was made on, kept out of what is uploaded."""
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMING = ("llmopt.json", "eval-before.json", "eval-after.json", "recipe.yaml", "llmopt.log")    # files that name paths


def shareable(folder: Path) -> dict[str, str]:
    """{file: its text} of the files that name local paths, with the last part of each path in its place."""
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in NAMING if (folder / name).is_file()}
    found = {str(folder.resolve())}
    for name, text in texts.items():
        found |= set(_paths(json.loads(text))) if name.endswith(".json") else set()
    for path in sorted(found, key=len, reverse=True):           # the longest first: one may lie in another
        texts = {name: text.replace(path, Path(path).name) for name, text in texts.items()}
    return texts


def _paths(value: Any) -> Iterator[str]:
    """The texts in a JSON document that are paths of this machine and no names of the hub."""
    if isinstance(value, str) and len(value) > 1 and value.startswith(("/", "~", "./", "../")) and "\n" not in value:
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (*_paths(key), *_paths(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from _paths(inner)
