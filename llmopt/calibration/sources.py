"""Calibration rows that are read: the embedded world, a text or .jsonl file, token ids.

A source is a function (spec, length, tokenizer) -> rows of token ids, the first of which do not depend on
spec.samples: rows behind those that calibration takes are held out. A document longer than a row is cut into several:
first come the first rows of all documents, then their second rows, and so on.
"""
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from llmopt.errors import LlmoptError
from llmopt.files.checks import parse_json, refusals
from llmopt.files.limited import limited
from llmopt.specs import DataSpec

END_OF_DOCUMENT = "<|endoftext|>"
MIN_TOKENS = 32                 # fewer say nothing about a model
MAX_TOKENS = 50_000_000         # take 800 MB, ids and mask
WIDEST = 16                     # characters of a token: what lies beyond all rows of a document is not tokenised


def check_amount(spec: DataSpec, length: int) -> None:
    """Raise LlmoptError for more tokens than can be held."""
    if spec.samples * length > MAX_TOKENS:
        raise LlmoptError(f"{spec.samples:,} samples of {length:,} tokens are too many; at most {MAX_TOKENS:,} tokens")


def world(spec: DataSpec, length: int, tokenizer: Any) -> list[Tensor]:
    """Rows of the embedded world, for the tokenizer of llmopt/reference alone."""
    from llmopt_evals.world.text import calibration_ids
    from llmopt_evals.world.words import ID

    if tokenizer is None or tokenizer.get_vocab() != dict(ID):
        raise LlmoptError("the embedded world is written in the vocabulary of llmopt/reference; this model has "
                          "another. Give data: {name: self}, rows sampled from the model, or calibration text of your "
                          "own, data: {name: text, path: FILE}")
    check_amount(spec, length)
    return list(calibration_ids(spec.samples, length, spec.seed))


def text(spec: DataSpec, length: int, tokenizer: Any) -> list[list[int]]:
    """Rows of a file's documents."""
    content = read_text(spec.path)
    if spec.path.endswith(".jsonl"):
        documents = [column(record, spec, f"line {i + 1}") for i, record in enumerate(json_lines(content))]
    else:
        documents = [part.strip() for part in content.split(END_OF_DOCUMENT)]
    return tokenised([d for d in documents if d], spec, length, tokenizer)


def ids(spec: DataSpec, length: int, tokenizer: Any) -> list[list[int]]:
    """The lists of token ids of a .jsonl file."""
    rows = json_lines(read_text(spec.path))
    for i, row in enumerate(rows):
        if not isinstance(row, list) or not all(isinstance(x, int) and not isinstance(x, bool) for x in row):
            raise LlmoptError(f"line {i + 1} is not a list of token ids")
    return [row if spec.length is None else row[:length] for row in rows]


def tokenised(documents: list, spec: DataSpec, length: int, tokenizer: Any) -> list[list[int]]:
    """Rows of documents: texts, or lists of messages for the chat template."""
    if tokenizer is None:
        raise LlmoptError("the model folder has no tokenizer, so text cannot be read; use data: {name: ids, path: ...}")
    chosen = documents[:spec.samples]
    if spec.template == "chat":
        if tokenizer.chat_template is None:
            raise LlmoptError("data.template is chat, but the tokenizer has no chat template")
        return limited(lambda: [_chat(document, tokenizer)[:length] for document in chosen],
                       "the chat template cannot be used", sum(len(str(document)) for document in chosen))
    texts = [document[:spec.samples * length * WIDEST] for document in chosen]
    cut = limited(lambda: [_rows(_ids_of(text, tokenizer), length, tokenizer.bos_token_id) for text in texts],
                  "the tokenizer cannot be used", sum(map(len, texts)))
    return [row for turn in zip_longest(*cut) for row in turn if row is not None]


def _ids_of(text: str, tokenizer: Any) -> list[int]:
    with refusals(f"it refuses {text[:60]!r}"):
        return tokenizer(text, truncation=False)["input_ids"]


def _rows(ids: list[int], length: int, bos: int | None) -> list[list[int]]:
    """A document in rows of `length` tokens, BOS in front of each; a rest of fewer than MIN_TOKENS is left out."""
    ids = ids[1:] if bos is not None and ids[:1] == [bos] else ids
    front = [] if bos is None else [bos]
    step = length - len(front)
    starts = range(0, max(1, len(ids) - min(step, MIN_TOKENS) + 1), step)
    return [front + ids[start:start + step] for start in starts]


def _chat(document: Any, tokenizer: Any) -> list[int]:
    """The ids of a list of messages, or of plain text as the user's turn; the template alone adds special tokens."""
    messages = document if isinstance(document, list) else [{"role": "user", "content": document}]
    with refusals(f"it refuses {str(messages)[:60]}"):
        return tokenizer.apply_chat_template(messages)["input_ids"]


def check_file(path: str) -> Path:
    """The file at `path`; raises LlmoptError where there is none, or an empty one."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise LlmoptError("a file expected, this is a folder" if file.is_dir() else "there is no such file")
    if file.stat().st_size == 0:
        raise LlmoptError("the file is empty")
    return file


def read_text(path: str) -> str:
    """The text of a file, a byte order mark left out."""
    file = check_file(path)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise LlmoptError(f"not UTF-8 text (byte {error.start})") from error


def json_lines(text: str) -> list:
    """The value of every line of a .jsonl file that is not empty."""
    rows = []
    for i, line in enumerate(text.split("\n")):          # splitlines() also cuts inside JSON strings
        if line.strip():
            rows.append(parse_json(line, f"line {i + 1}"))
    return rows


def column(record: Any, spec: DataSpec, where: str) -> Any:
    """What a record holds under spec.column: a text, or a list of messages for the chat template."""
    if not isinstance(record, dict) or spec.column not in record:
        known = ", ".join(record) if isinstance(record, dict) else repr(record)[:60]
        raise LlmoptError(f"{where} has no column {spec.column!r} (it has: {known}); data.column names another")
    value = record[spec.column]
    turns, chat = isinstance(value, list) and all(map(is_message, value)), spec.template == "chat"
    if value is not None and not isinstance(value, str) and not (turns and chat):
        expected = "text, or a list of {role, content}" if chat else "text"
        hint = "; data.template: chat takes conversations" if turns and not chat else ""
        raise LlmoptError(f"{where}: {spec.column!r} holds {str(value)[:60]}, {expected} expected{hint}")
    return value


def is_message(value: Any) -> bool:
    """True for one turn of a conversation."""
    return isinstance(value, dict) and "role" in value and ("content" in value or "tool_calls" in value)
