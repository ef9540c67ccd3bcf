"""Calibration batches from the model itself, its embedded world, a text or .jsonl file, token ids, or a hub dataset.

A batch is {"input_ids": [B, T], "attention_mask": [B, T]}, right-padded; padding never enters a statistic. A document
longer than a row is cut into several: first come the first rows of all documents, then their second rows, and so on.
"""
import hashlib
import os
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.calibration.sampling import LENGTH, Sampler
from llmopt.errors import LlmoptError, naming
from llmopt.files.checks import parse_json, refusals
from llmopt.files.limited import limited
from llmopt.specs import DataSpec

END_OF_DOCUMENT = "<|endoftext|>"
DEFAULT_LENGTH = 512
MIN_TOKENS = 32                 # fewer say nothing about a model
MAX_TOKENS = 50_000_000         # take 800 MB, ids and mask
WIDEST = 16                     # characters of a token: what lies beyond all rows of a document is not tokenised
Batch = dict[str, Tensor]


def load(spec: DataSpec, config: Any, tokenizer: Any, sampler: Sampler | None = None) -> list[Batch]:
    """The batches that `spec` describes, checked against the model's vocabulary and maximum length.

    sampler: draws the rows of `self`; a source that is not named is taken to be that.
    """
    limit = getattr(config, "max_position_embeddings", DEFAULT_LENGTH)
    if spec.length is not None and spec.length > limit:
        raise LlmoptError(f"data.length is {spec.length}, but the model reads at most {limit} tokens")
    own = spec.name in (None, "self")
    length = spec.length or min(LENGTH if own else DEFAULT_LENGTH, limit)
    with naming(f"data ({spec.name or 'self'}{': ' + spec.path if spec.path else ''})"):
        rows = _self(spec, length, sampler) if own else SOURCES[spec.name](spec, length, tokenizer)
        rows = [row for row in rows if len(row) > 1][:spec.samples]
        batches = as_batches(rows, config.vocab_size, spec.batch_size)
        _check_lengths([len(row) for row in rows], limit)
        return batches


def _check_lengths(lengths: list[int], limit: int) -> None:
    """Raise LlmoptError for a row too long for the model, or too few tokens altogether to calibrate on."""
    if max(lengths) > limit:
        raise LlmoptError(f"a row has {max(lengths)} tokens, but the model reads at most {limit}; set data.length")
    if sum(lengths) < MIN_TOKENS:
        raise LlmoptError(f"too short: {sum(lengths)} tokens in all; at least {MIN_TOKENS} are needed")


def as_batches(rows: Any, vocab_size: int, batch_size: int = 8) -> list[Batch]:
    """Batches from an id tensor [N, T], id lists, or ready batches, one or many; empty or foreign ids are refused."""
    rows = [rows] if isinstance(rows, Mapping) else rows            # one batch, as a tokenizer returns it
    rows = list(rows) if isinstance(rows, Iterable) and not isinstance(rows, str) else [rows]
    if rows and all(isinstance(row, Mapping) for row in rows):
        return [_ready(batch, vocab_size) for batch in rows]
    rows = [row.tolist() if isinstance(row, Tensor) and row.ndim == 1 else row for row in rows]
    if not all(isinstance(row, (list, tuple)) and all(type(token) is int for token in row) for row in rows):
        raise LlmoptError("token ids [N, T], a list of lists of ids, or batches {input_ids, attention_mask} expected")
    if not rows or min(map(len, rows)) == 0:
        raise LlmoptError("no document of at least 2 tokens was found")
    check_ids(((min(row), max(row)) for row in rows), vocab_size)
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    return [_pad(rows[i:i + batch_size]) for i in range(0, len(rows), batch_size)]


def _ready(batch: Batch, vocab_size: int) -> Batch:
    if "input_ids" not in batch:
        raise LlmoptError(f"a batch needs input_ids; this one has {', '.join(map(str, batch)) or 'nothing'}")
    ids = batch["input_ids"]
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
        raise LlmoptError('input_ids of a batch is not a tensor [B, T]; ask the tokenizer for return_tensors="pt"')
    if ids.is_floating_point() or ids.is_complex():
        raise LlmoptError(f"input_ids of a batch are {str(ids.dtype).removeprefix('torch.')}; token ids are integers")
    check_ids([(int(ids.min()), int(ids.max()))], vocab_size)
    mask = batch.get("attention_mask", torch.ones_like(ids))
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise LlmoptError(f"attention_mask of a batch is {list(getattr(mask, 'shape', []))}, its input_ids are "
                          f"{list(ids.shape)}; they must be alike")
    return {"input_ids": ids, "attention_mask": mask}


def check_ids(ranges: Iterable[tuple[int, int]], vocab_size: int) -> None:
    """Raise LlmoptError for a token that the model does not have; ranges: least and greatest id of each row."""
    for foreign in (token for both in ranges for token in both if not 0 <= token < vocab_size):
        raise LlmoptError(f"token id {foreign} does not fit the model's vocabulary of {vocab_size}: "
                          "the tokenizer or the ids belong to another model")


def amount(batches: list[Batch]) -> dict[str, int]:
    """{"samples": rows, "tokens": real tokens} of all batches."""
    return {"samples": sum(len(batch["input_ids"]) for batch in batches),
            "tokens": int(sum(batch["attention_mask"].sum() for batch in batches))}


def fingerprint(batches: list[Batch]) -> str:
    """SHA-256 of the ids and masks, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        for key in ("input_ids", "attention_mask"):
            digest.update(str(tuple(batch[key].shape)).encode() + batch[key].to(torch.int64).numpy().tobytes())
    return digest.hexdigest()


def _pad(rows: list[Tensor]) -> Batch:
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, :len(row)], mask[i, :len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def _check_amount(spec: DataSpec, length: int) -> None:
    if spec.samples * length > MAX_TOKENS:
        raise LlmoptError(f"{spec.samples:,} samples of {length:,} tokens are too many; at most {MAX_TOKENS:,} tokens")


def _self(spec: DataSpec, length: int, sampler: Sampler | None) -> list[list[int]]:
    if sampler is None:
        raise LlmoptError("these rows are sampled from the model itself, and none was given")
    _check_amount(spec, length)
    return sampler.rows(spec, length)


def _world(spec: DataSpec, length: int, tokenizer: Any) -> list[Tensor]:
    from llmopt_evals import world
    from llmopt_evals.world.words import ID

    if tokenizer is None or tokenizer.get_vocab() != dict(ID):
        raise LlmoptError("the embedded world is written in the vocabulary of llmopt/reference; this model has "
                          "another. Give data: {name: self}, rows sampled from the model, or calibration text of your "
                          "own, data: {name: text, path: FILE}")
    _check_amount(spec, length)
    return list(world.calibration_ids(spec.samples, length, spec.seed))


def _text(spec: DataSpec, length: int, tokenizer: Any) -> list[list[int]]:
    text = read_text(spec.path)
    if spec.path.endswith(".jsonl"):
        documents = [_column(record, spec, f"line {i + 1}") for i, record in enumerate(json_lines(text))]
    else:
        documents = [part.strip() for part in text.split(END_OF_DOCUMENT)]
    return _tokenise([d for d in documents if d], spec, length, tokenizer)


def _ids(spec: DataSpec, length: int, tokenizer: Any) -> list[list[int]]:
    rows = json_lines(read_text(spec.path))
    for i, row in enumerate(rows):
        if not isinstance(row, list) or not all(isinstance(x, int) and not isinstance(x, bool) for x in row):
            raise LlmoptError(f"line {i + 1} is not a list of token ids")
    return [row if spec.length is None else row[:length] for row in rows]


def _hub(spec: DataSpec, length: int, tokenizer: Any) -> list[list[int]]:
    import datasets

    try:
        dataset = datasets.load_dataset(os.path.expanduser(spec.path), spec.config, split=spec.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise LlmoptError(f"the dataset cannot be loaded: {str(error).splitlines()[0]}") from error
    chosen = dataset.shuffle(seed=spec.seed).select(range(min(len(dataset), spec.samples * 4)))
    return _tokenise([_column(r, spec, f"row {i}") for i, r in enumerate(chosen)], spec, length, tokenizer)


SOURCES = {"world": _world, "text": _text, "ids": _ids, "hub": _hub}


def _tokenise(documents: list, spec: DataSpec, length: int, tokenizer: Any) -> list[list[int]]:
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


def read_text(path: str) -> str:
    """The text of a file, a byte order mark left out."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise LlmoptError("a file expected, this is a folder" if file.is_dir() else "there is no such file")
    if file.stat().st_size == 0:
        raise LlmoptError("the file is empty")
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


def _column(record: Any, spec: DataSpec, where: str) -> Any:
    if not isinstance(record, dict) or spec.column not in record:
        known = ", ".join(record) if isinstance(record, dict) else repr(record)[:60]
        raise LlmoptError(f"{where} has no column {spec.column!r} (it has: {known})")
    value = record[spec.column]
    turns = spec.template == "chat" and isinstance(value, list)
    if value is not None and not isinstance(value, str) and not (turns and all(map(_is_message, value))):
        expected = "text, or a list of {role, content}" if spec.template == "chat" else "text"
        raise LlmoptError(f"{where}: {spec.column!r} holds {str(value)[:60]}, {expected} expected")
    return value


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value and ("content" in value or "tool_calls" in value)
