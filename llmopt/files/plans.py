"""plan.json, beside a checkpoint: what its steps have decided, a key for each family; read back, changed or not."""
from pathlib import Path
from typing import Any

from llmopt.errors import LlmoptError
from llmopt.files.checks import load_json

FILE = "plan.json"


def read_part(file: Path, key: str, kind: type, example: str, field: str) -> Any:
    """What a plan holds under `key`, a `kind` that is not empty. field: of the step, that names the file.

    Raises LlmoptError for a file that is not there, or holds no such part; example: of one.
    """
    if not file.is_file():
        raise LlmoptError(f"{field}: there is no file {file}")
    held = load_json(file)
    found = held.get(key) if isinstance(held, dict) else None
    if not isinstance(found, kind) or not found:
        raise LlmoptError(f'{file}: holds no plan; expected {{"{key}": {example}}}')
    return found
