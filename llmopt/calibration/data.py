"""Calibration batches: loaded by a specification, or held out from what calibration sees.

A batch is {"input_ids": [B, T], "attention_mask": [B, T]}, right-padded; padding never enters a statistic. Where rows
come from: sampling.py (the model itself), sources.py (files, the embedded world), hub.py (datasets).
"""
import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmopt.calibration import hub, sources
from llmopt.calibration.sampling import LENGTH, Sampler
from llmopt.calibration.sources import MIN_TOKENS, check_amount
from llmopt.errors import LlmoptError, naming
from llmopt.progress import Spoken
from llmopt.specs import MAX_SAMPLES, WITH_PATH, DataSpec

LOG = logging.getLogger(__name__)
DEFAULT_LENGTH = 512
SOURCES = {"world": sources.world, "text": sources.text, "ids": sources.ids, "hub": hub.rows,
           **dict.fromkeys(hub.ALIASES, hub.rows)}
Batch = dict[str, Tensor]


def load(spec: DataSpec, config: Any, tokenizer: Any, sampler: Sampler | None = None) -> list[Batch]:
    """The batches that `spec` describes, checked against the model's vocabulary and maximum length.

    sampler: draws the rows of `self`; a source that is not named is taken to be that.
    """
    limit = _limit(config)
    if spec.length is not None and spec.length > limit:
        raise LlmoptError(f"data.length is {spec.length}, but the model reads at most {limit} tokens")
    with naming(_place(spec)):
        if _is_own(spec):
            rows = _sampled(spec, _length(spec, limit), sampler)
        else:
            rows = _read(spec, _length(spec, limit), tokenizer)[:spec.samples]
        batches = as_batches(shifted(rows, spec.shifts), config.get_text_config().vocab_size, spec.batch_size)
        _check_lengths([len(row) for row in rows], limit)
        return batches


def check_source(spec: DataSpec) -> None:
    """Raise LlmoptError for a file that is not there or a dataset that cannot be had: before a model is loaded."""
    with naming(_place(spec)):
        if SOURCES.get(spec.name) is hub.rows:
            hub.check(spec)
        elif spec.name in WITH_PATH:
            sources.check_file(spec.path)


def held_out(spec: DataSpec, tokenizer: Any, model: nn.Module, rows: int, length: int) -> list[Batch]:
    """At most `rows` rows of at most `length` tokens from the source of `spec` that calibration by `spec` does not see.

    They are those behind its spec.samples rows; where nothing is left behind them, a note says so and they are sampled
    from `model`, which must be the dense one and have its weights in memory if rows are sampled. Always the same.
    """
    limit, found = _limit(model.config), []
    if not _is_own(spec):
        more = replace(spec, samples=min(spec.samples + rows, MAX_SAMPLES))
        with naming(_place(spec)):
            found = [row[:length] for row in _read(more, _length(spec, limit), tokenizer)[spec.samples:][:rows]]
        if sum(map(len, found)) < MIN_TOKENS:
            LOG.info("%s: calibration leaves no rows over; held-out rows are sampled from the model", _place(spec))
            found = []
    if not found:
        wanted = replace(spec, samples=rows)
        with naming("held-out rows"):
            check_amount(wanted, length)
            found = Sampler(model, tokenizer, progress=Spoken()).rows(wanted, min(length, limit), first=spec.samples)
    return as_batches(found, model.config.get_text_config().vocab_size, spec.batch_size)


def _is_own(spec: DataSpec) -> bool:
    return spec.name in (None, "self")


def _place(spec: DataSpec) -> str:
    return f"data ({spec.name or 'self'}{': ' + spec.path if spec.path else ''})"


def _limit(config: Any) -> int:
    return getattr(config.get_text_config(), "max_position_embeddings", DEFAULT_LENGTH)


def _length(spec: DataSpec, limit: int) -> int:
    return spec.length or min(LENGTH if _is_own(spec) else DEFAULT_LENGTH, limit)


def _read(spec: DataSpec, length: int, tokenizer: Any) -> list:
    """The rows of a source that is read; one of a single token says nothing."""
    return [row for row in SOURCES[spec.name](spec, length, tokenizer) if len(row) > 1]


def _sampled(spec: DataSpec, length: int, sampler: Sampler | None) -> list[list[int]]:
    if sampler is None:
        raise LlmoptError("these rows are sampled from the model itself, and none was given")
    check_amount(spec, length)
    return sampler.rows(spec, length)


def shifted(rows: list, copies: int) -> list:
    """Each row, then turned to the right by 1, 2, ... of `copies` equal parts: every token stands in several places."""
    if copies == 1:
        return rows
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in rows]
    cuts = [[len(row) - step * len(row) // copies for step in range(copies)] for row in rows]
    return [row[cut:] + row[:cut] for row, places in zip(rows, cuts, strict=True) for cut in places]


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
