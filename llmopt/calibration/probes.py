"""Probes for head scores: questions whose answer stands in their context, and what happens when it does not.

    world         facts of the embedded world, stated once among other statements
    tokens        random ids among random ids, a key and its value: works on any model
    FILE.jsonl    a line each: {"context", "question", "answer", "corrupted"}, text or token ids; `corrupted` may be
                  missing, and has as many tokens as the context
"""
from typing import Any

import torch
from torch import Tensor

from llmopt.calibration.data import Batch, check_ids
from llmopt.calibration.sources import json_lines, read_text
from llmopt.errors import LlmoptError, naming, nearest
from llmopt.files.checks import refusals
from llmopt.method import Probe

KEYS = ("context", "question", "answer", "corrupted")
NEEDLE = 3              # tokens of a planted key, and of its value
LIMIT = 2048            # tokens, for a model that does not say how many it reads


def load(source: str, count: int, length: int, seed: int, config: Any, tokenizer: Any) -> list[Probe]:
    """`count` probes of contexts of about `length` tokens; of a file its first `count`, whatever their lengths."""
    limit = getattr(config, "max_position_embeddings", LIMIT)
    with naming(f"probe ({source})"):
        if source.endswith(".jsonl"):
            found = _of_file(source, count, config.vocab_size, tokenizer)
        elif source == "world":
            found = _of_world(count, min(length, limit - 8), seed, tokenizer)
        else:
            found = _of_tokens(count, min(length, limit - 2 * NEEDLE), seed, _ordinary(config, tokenizer), config)
        for index, probe in enumerate(found):
            if len(probe.ids) > limit:
                raise LlmoptError(f"probe {index + 1} has {len(probe.ids)} tokens, but the model reads at most {limit}")
        return found


def _of_world(count: int, length: int, seed: int, tokenizer: Any) -> list[Probe]:
    from llmopt_evals import world

    if not world.speaks_world(tokenizer):
        raise LlmoptError("the embedded world is written in the vocabulary of llmopt/reference; this model has "
                          "another: use probe: tokens, or a FILE.jsonl of your own")
    return [Probe(*map(torch.tensor, parts)) for parts in world.probes(count, length, seed)]


def _of_tokens(count: int, length: int, seed: int, ordinary: Tensor, config: Any) -> list[Probe]:
    """`[BOS] filler KEY VALUE filler`, asked with KEY; corrupted: another VALUE. No token of a probe occurs twice in
    key and value, and none of them in the filler."""
    generator, probes = torch.Generator().manual_seed(seed), []
    front = torch.tensor([config.bos_token_id] if isinstance(config.bos_token_id, int) else [], dtype=torch.long)
    room = length - len(front) - 2 * NEEDLE
    if room < 2 or len(ordinary) < 4 * NEEDLE:
        raise LlmoptError(f"a context of {length} tokens out of {len(ordinary)} leaves no room for a needle")
    for _ in range(count):
        drawn = ordinary[torch.randperm(len(ordinary), generator=generator)]
        key, value, other, rest = drawn.split([NEEDLE, NEEDLE, NEEDLE, len(drawn) - 3 * NEEDLE])
        filler = rest[torch.randint(len(rest), (room,), generator=generator)]
        depth = int(torch.randint(1, room, (1,), generator=generator))
        context, corrupted = (torch.cat([front, filler[:depth], key, planted, filler[depth:]])
                              for planted in (value, other))
        probes.append(Probe(context, key, value, corrupted))
    return probes


def _ordinary(config: Any, tokenizer: Any) -> Tensor:
    """The ids of the vocabulary that have no special meaning."""
    size = config.vocab_size if tokenizer is None else min(config.vocab_size, len(tokenizer))
    told = [getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
    special = {i for ids in told for i in (ids if isinstance(ids, list) else [ids])}
    special |= set() if tokenizer is None else set(tokenizer.all_special_ids)
    return torch.tensor([i for i in range(size) if i not in special])


def _of_file(source: str, count: int, vocabulary: int, tokenizer: Any) -> list[Probe]:
    lines = json_lines(read_text(source))[:count]
    if not lines:
        raise LlmoptError("holds no probe")
    found = []
    for index, line in enumerate(lines):
        with naming(f"line {index + 1}"):
            found.append(_probe(line, vocabulary, tokenizer))
    return found


def _probe(line: Any, vocabulary: int, tokenizer: Any) -> Probe:
    if not isinstance(line, dict):
        raise LlmoptError(f"{str(line)[:60]} given, {{context, question, answer}} expected")
    for key in line:
        if key not in KEYS:
            raise LlmoptError(f"unknown key {key!r}{nearest(key, KEYS)}")
    for key in KEYS[:3]:
        if line.get(key) in (None, "", []):
            raise LlmoptError(f"the {key} is missing")
    context, question, answer, corrupted = (
        None if line.get(key) is None else _ids(key, line[key], vocabulary, tokenizer) for key in KEYS)
    if corrupted is not None and len(corrupted) != len(context):
        raise LlmoptError(f"corrupted has {len(corrupted)} tokens and the context {len(context)}; they must be as many")
    return Probe(context, question, answer, corrupted)


def _ids(key: str, given: Any, vocabulary: int, tokenizer: Any) -> Tensor:
    """Token ids of one part, BOS in front of a context that is text."""
    if isinstance(given, str):
        if tokenizer is None:
            raise LlmoptError(f"{key} is text, but the model folder has no tokenizer; give token ids")
        with refusals(f"the tokenizer refuses {given[:60]!r}"):
            ids = tokenizer(given, add_special_tokens=False)["input_ids"]
        bos = tokenizer.bos_token_id
        given = [bos, *ids] if bos is not None and key in ("context", "corrupted") else ids
    if not isinstance(given, list) or not given or not all(type(i) is int for i in given):
        raise LlmoptError(f"{key}: {str(given)[:60]} given, text or a list of token ids expected")
    check_ids([(min(given), max(given))], vocabulary)
    return torch.tensor(given)


def as_batches(found: list[Probe]) -> list[Batch]:
    """A batch of one row for each probe: context, question and answer, as a walk through the blocks reads them."""
    return [{"input_ids": probe.ids[None], "attention_mask": torch.ones_like(probe.ids)[None]} for probe in found]


def is_source(name: str) -> bool:
    """True if `name` can be the source of probes."""
    return name in ("world", "tokens") or name.endswith(".jsonl")
