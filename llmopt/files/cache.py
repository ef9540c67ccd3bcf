"""The user's cache folder: what is costly to make and follows from its key alone, such as scores and sampled rows.

The folder is $LLMOPT_CACHE, else $XDG_CACHE_HOME/llmopt, else ~/.cache/llmopt. An entry is a JSON file named by the
hash of its key. It is believed only if it carries the whole key, and the right sum of its part; else it is made anew.
"""
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError
from llmopt.files.checks import load_json
from llmopt.files.json_shapes import check_shape
from llmopt.files.shards import write_text

VARIABLE = "LLMOPT_CACHE"
SHAPE = {"key": dict, "date": str, "sum": str}


def folder(kind: str) -> Path:
    """The folder of this user's entries of one kind; raises RuntimeError for a user without a home."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser() / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llmopt" / kind


def read(kind: str, key: dict[str, Any]) -> dict[str, Any] | None:
    """{"key", "date", "part"} of the entry with this key; None where there is none that can be believed."""
    try:
        file = folder(kind) / name_of(key)
        content = load_json(file)
        check_shape(content, SHAPE, str(file))
        whole = content["key"] == key and content["sum"] == digest(content["part"])
        return content if whole else None
    except (LlmoptError, OSError, RuntimeError, KeyError):      # damaged, foreign, not to be read: made anew
        return None


def write(kind: str, key: dict[str, Any], part: Any) -> None:
    """Keep `part`, which is plain JSON; where nothing can be written, nothing is kept."""
    try:
        place = folder(kind)
        place.mkdir(parents=True, exist_ok=True)
        content = {"key": key, "date": time.strftime("%Y-%m-%d"), "sum": digest(part), "part": part}
        write_text(place / name_of(key), json.dumps(content) + "\n")
    except (OSError, RuntimeError):
        return


def name_of(key: dict[str, Any]) -> str:
    """The file name of the entry with this key."""
    return digest(key) + ".json"


def digest(value: Any) -> str:
    """SHA-256 of plain JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
