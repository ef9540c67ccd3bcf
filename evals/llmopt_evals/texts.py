"""A user's text for the tasks that read one: checked before any model is loaded."""
import os
from pathlib import Path

from llmopt.errors import LlmoptError, naming
from llmopt.files.checks import parse_json

END_OF_DOCUMENT = "<|endoftext|>"
VARIABLE = "LLMOPT_TEXT"


def documents(path: str | None) -> list[str]:
    """The documents of a file: lines of .jsonl with `text`, else parts between `<|endoftext|>`.

    path: `~` is expanded; None: the file named by LLMOPT_TEXT.
    Raises LlmoptError for no file, no UTF-8, a line without `text`, and a file without words.
    """
    path = path or os.environ.get(VARIABLE)
    if not path:
        raise LlmoptError(f"no text is given: --text FILE, eval.text in a recipe, or {VARIABLE}=FILE")
    file = Path(path).expanduser()
    with naming(f"text {file}"):
        content = _read(file)
        parts = _lines(content) if file.suffix == ".jsonl" else content.split(END_OF_DOCUMENT)
        found = [part.strip() for part in parts if part.strip()]
        if not found:
            raise LlmoptError("holds no words")
        return found


def _read(file: Path) -> str:
    """The text of a file, a byte order mark left out."""
    if not file.is_file():
        raise LlmoptError("a file expected, this is none" if file.exists() else "there is no such file")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise LlmoptError(f"not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise LlmoptError(f"cannot be read: {error.strerror}") from error


def _lines(content: str) -> list[str]:
    """The column `text` of every line."""
    found = []
    for number, line in enumerate(content.split("\n"), 1):       # splitlines() also cuts inside JSON strings
        if line.strip():
            record = parse_json(line, f"line {number}")
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise LlmoptError(f"line {number}: a mapping with the key 'text' expected")
            found.append(record["text"])
    return found
