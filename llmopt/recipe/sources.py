"""Calibration data by one word: a file, a source that needs no more than its name, or a dataset of the hub."""
import json
import typing
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError, closest
from llmopt.parts import fields_of
from llmopt.specs import WITH_PATH, DataSpec

HEAD = 1 << 20          # characters in which the first line of a .jsonl file must end to be looked at


def named() -> list[str]:
    """The sources that need no path."""
    hint = fields_of(DataSpec)["name"].annotation
    literals = [hint, *typing.get_args(hint)]
    words = [word for literal in literals if typing.get_origin(literal) is typing.Literal
             for word in typing.get_args(literal)]
    return [word for word in words if word not in WITH_PATH]


def source(word: str) -> dict[str, Any]:
    """The keys of a recipe's data section that `word` stands for."""
    file = Path(word).expanduser()
    if word in named():
        return {"name": word}
    if file.is_file():
        return {"name": "text", "path": word} | (_lines(file) if word.endswith(".jsonl") else {})
    if file.is_dir() or ("/" in word and not file.suffix and not word.startswith((".", "/", "~"))):
        return {"name": "hub", "path": word}
    raise LlmoptError(f"data {word}: there is no such file, and it is none of the sources "
                      f"{', '.join(named())}{closest(word, named())}; a dataset of the hub is OWNER/NAME")


def _lines(file: Path) -> dict[str, Any]:
    """What the first line of a .jsonl file tells of all: token ids, a conversation, or a text."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        first = next((line for line in iter(lambda: lines.readline(HEAD), "") if line.strip()), "")
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):                # the reader of the data says what is wrong with it
        return {}
    if isinstance(value, list):
        return {"name": "ids"}
    talk = isinstance(value, dict) and "text" not in value and isinstance(value.get("messages"), list)
    return {"column": "messages", "template": "chat"} if talk else {}
