"""Calibration batches from the embedded world, a text or .jsonl file, token ids, or a dataset of the hub.

A batch is {"input_ids": [B, T], "attention_mask": [B, T]}, right-padded; padding never enters a statistic.
"""
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.method import LlmoptError, naming
from llmopt.recipe import DataSpec

END_OF_DOCUMENT = "<|endoftext|>"
DEFAULT_LENGTH = 512
Batch = dict[str, Tensor]


def load(spec: DataSpec, config: Any, tokenizer: Any) -> list[Batch]:
    """The batches that `spec` describes, checked against the model's vocabulary and maximum length."""
    limit = getattr(config, "max_position_embeddings", DEFAULT_LENGTH)
    if spec.length is not None and spec.length > limit:
        raise LlmoptError(f"data.length is {spec.length}, but the model reads at most {limit} tokens")
    length = spec.length or min(DEFAULT_LENGTH, limit)
    with naming(f"data ({spec.name}{': ' + spec.path if spec.path else ''})"):
        rows = SOURCES[spec.name](spec, length, tokenizer)
        rows = [row for row in rows if len(row) > 1][:spec.samples]
        return as_batches(rows, config.vocab_size, spec.batch_size)


def as_batches(rows: Any, vocab_size: int, batch_size: int = 8) -> list[Batch]:
    """Batches from an id tensor [N, T], a list of id lists, or ready batches; empty or foreign ids are refused."""
    if isinstance(rows, list) and rows and isinstance(rows[0], dict):
        return [{"input_ids": (ids := batch["input_ids"]),
                 "attention_mask": batch.get("attention_mask", torch.ones_like(ids))} for batch in rows]
    rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    if not rows:
        raise LlmoptError("no document of at least 2 tokens was found")
    top = max(int(row.max()) for row in rows)
    if top >= vocab_size or min(int(row.min()) for row in rows) < 0:
        raise LlmoptError(f"token id {top} does not fit the model's vocabulary of {vocab_size}: "
                          "the tokenizer or the ids belong to another model")
    return [_pad(rows[i:i + batch_size]) for i in range(0, len(rows), batch_size)]


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


def _world(spec: DataSpec, length: int, tokenizer: Any) -> list[Tensor]:
    from llmopt_evals import world
    from llmopt_evals.world.words import ID

    if tokenizer is None or tokenizer.get_vocab() != dict(ID):
        raise LlmoptError("the embedded world is written in the vocabulary of llmopt/reference; this model has "
                          "another. Give calibration text of your own: data: {name: text, path: FILE}")
    return list(world.calibration_ids(spec.samples, length, spec.seed))


def _text(spec: DataSpec, length: int, tokenizer: Any) -> list[list[int]]:
    path = _file(spec.path)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        documents = [_column(record, spec, f"line {i + 1}") for i, record in enumerate(_json_lines(text))]
    else:
        documents = [part.strip() for part in text.split(END_OF_DOCUMENT)]
    return _tokenise([d for d in documents if d], spec, length, tokenizer)


def _ids(spec: DataSpec, length: int, tokenizer: Any) -> list[list[int]]:
    rows = _json_lines(_file(spec.path).read_text(encoding="utf-8"))
    for i, row in enumerate(rows):
        if not isinstance(row, list) or not all(isinstance(x, int) and not isinstance(x, bool) for x in row):
            raise LlmoptError(f"line {i + 1} is not a list of token ids")
    return [row if spec.length is None else row[:length] for row in rows]


def _hub(spec: DataSpec, length: int, tokenizer: Any) -> list[list[int]]:
    import datasets

    try:
        dataset = datasets.load_dataset(spec.path, spec.config, split=spec.split)
    except (OSError, ValueError, ConnectionError) as error:
        raise LlmoptError(f"the dataset cannot be loaded: {error}") from error
    chosen = dataset.shuffle(seed=spec.seed).select(range(min(len(dataset), spec.samples * 4)))
    return _tokenise([_column(r, spec, f"row {i}") for i, r in enumerate(chosen)], spec, length, tokenizer)


SOURCES = {"world": _world, "text": _text, "ids": _ids, "hub": _hub}


def _tokenise(documents: list, spec: DataSpec, length: int, tokenizer: Any) -> list[list[int]]:
    if tokenizer is None:
        raise LlmoptError("the model folder has no tokenizer, so text cannot be read; use data: {name: ids, path: ...}")
    if spec.template == "chat":
        return [_chat(d, tokenizer)[:length] for d in documents[:spec.samples]]
    bos = tokenizer.bos_token_id
    rows = []
    for document in documents[:spec.samples]:
        ids = tokenizer(document, truncation=False)["input_ids"]
        ids = ids if bos is None or ids[:1] == [bos] else [bos, *ids]
        rows.append(ids[:length])
    return rows


def _chat(document: Any, tokenizer: Any) -> list[int]:
    if tokenizer.chat_template is None:
        raise LlmoptError("data.template is chat, but the tokenizer has no chat template")
    messages = document if isinstance(document, list) else [{"role": "user", "content": document}]
    return tokenizer.apply_chat_template(messages)["input_ids"]


def _file(path: str) -> Path:
    file = Path(path)
    if not file.is_file():
        raise LlmoptError("there is no such file")
    if file.stat().st_size == 0:
        raise LlmoptError("the file is empty")
    return file


def _json_lines(text: str) -> list:
    rows = []
    for i, line in enumerate(text.splitlines()):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise LlmoptError(f"line {i + 1} is not JSON: {error.msg}") from error
    return rows


def _column(record: Any, spec: DataSpec, where: str) -> Any:
    if not isinstance(record, dict) or spec.column not in record:
        known = ", ".join(record) if isinstance(record, dict) else repr(record)[:60]
        raise LlmoptError(f"{where} has no column {spec.column!r} (it has: {known})")
    return record[spec.column]
