"""Calibration rows from datasets of the Hugging Face hub, some of them by a short name.

Small datasets are downloaded once and kept by `datasets`; of large ones only the first files are read, as far as rows
are needed, shuffled within a buffer. A folder on this machine may stand in place of a name, as `datasets` has it.
"""
import os
import random
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from llmopt.calibration.sources import WIDEST, column, tokenised
from llmopt.errors import LlmoptError
from llmopt.files.checks import refusals
from llmopt.specs import DataSpec

BUFFER = 2000           # records among which a streamed dataset is shuffled: some 10 MB of web pages


@dataclass(frozen=True)
class Alias:
    """A dataset by its short name. streamed: too large to download; joined: its records are lines of one text."""

    path: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    template: str | None = None
    streamed: bool = False
    joined: bool = False

    def spec(self, given: DataSpec) -> DataSpec:
        """What the short name stands for."""
        return replace(given, name="hub", path=self.path, config=self.config, split=self.split, column=self.column,
                       template=self.template)


ALIASES = {
    "wikitext": Alias("Salesforce/wikitext", "wikitext-2-raw-v1", joined=True),
    "c4": Alias("allenai/c4", "en", streamed=True),
    "ultrachat": Alias("HuggingFaceH4/ultrachat_200k", None, "train_sft", "messages", "chat", streamed=True),
    "pile": Alias("NeelNanda/pile-10k"),                    # its first 10,000 documents; the whole is no longer offered
}


def rows(spec: DataSpec, length: int, tokenizer: Any) -> list[list[int]]:
    """Rows of the documents of a dataset, shuffled by the seed; empty documents do not count."""
    alias = ALIASES.get(spec.name)
    whole = alias.spec(spec) if alias else spec
    if tokenizer is None or (whole.template and tokenizer.chat_template is None):
        return tokenised([], whole, length, tokenizer)          # says what is missing before anything is read
    with reading(spec):
        records = _records(whole, alias)
        texts = (column(record, whole, f"row {i}") for i, record in enumerate(records))
        if alias and alias.joined:
            documents = [_joined(texts, whole.samples * length * WIDEST)]
        else:
            documents = list(islice((text for text in texts if text), whole.samples))
    return tokenised(documents, whole, length, tokenizer)


def check(spec: DataSpec) -> None:
    """Raise LlmoptError for a dataset of which not even the first record can be read."""
    alias = ALIASES.get(spec.name)
    with reading(spec):
        next(iter(_records(alias.spec(spec) if alias else spec, alias)), None)


@contextmanager
def reading(spec: DataSpec) -> Iterator[None]:
    """Whatever keeps a dataset from being read, the network or the dataset itself, is one line that names a way out."""
    name = ALIASES[spec.name].path if spec.name in ALIASES else spec.path
    try:
        with refusals(f"the dataset cannot be loaded: {name}"), _no_waiting():
            yield
    except LlmoptError as fact:
        if fact.__cause__ is None:          # about a record
            raise
        raise LlmoptError(f"{fact}; data: {{name: self}} needs none, its rows are sampled from the model itself"
                          ) from fact.__cause__


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside, where the hub's address is unknown, datasets come from the cache at once instead of after six tries."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not getproxies() and not _is_known(urlsplit(constants.ENDPOINT).hostname):
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _is_known(host: str | None) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def _records(spec: DataSpec, alias: Alias | None) -> Iterable[dict[str, Any]]:
    """The records of a dataset in an order that the seed gives; lines of one text stay in theirs, from any on."""
    import datasets

    streamed = alias is not None and alias.streamed
    found = datasets.load_dataset(os.path.expanduser(spec.path), spec.config, split=spec.split, streaming=streamed)
    if streamed:
        return found.shuffle(seed=spec.seed, buffer_size=BUFFER)
    if alias and alias.joined:
        first = random.Random(spec.seed).randrange(max(1, len(found)))
        return (found[i] for part in (range(first, len(found)), range(first)) for i in part)
    return found.shuffle(seed=spec.seed)


def _joined(texts: Iterable[str], characters: int) -> str:
    """One text of the first lines, until it is as long as wanted."""
    found, room = [], characters
    for text in texts:
        found.append(text)
        room -= len(text)
        if room <= 0:
            break
    return "".join(found)
