"""What dropping entries of a context costs the text that follows: nats a token, with and without.

    python -m llmopt_evals.continuations MODEL FILE.jsonl --limit 24 "kv.snapkv: {window: 16, allocate: ada}"

A line of the file is {"context", "question", "answer"}. The context alone is read with the methods in force, then
question and answer on what was kept, at their true places; the answer's tokens count, and an answer is right if each of
them is the model's first choice. A context is read once: lines in a row that share it are asked of one cache, and every
method gets a copy of it. Each argument after the file is one entry of a recipe's `steps`; where an entry says neither
`ratio` nor `budget`, it is tried at every `--ratio`. It may be a list of entries, or a checkpoint with what its methods
have learned; others that learn from text get that of `--data`, and head scores among the entries run first.
"""
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor, nn

from llmopt.calibration import data
from llmopt.errors import LlmoptError
from llmopt.method import Record, Run
from llmopt.model.loading import load_model
from llmopt.runtime import copies
from llmopt.runtime.attach import RuntimeMethod
from llmopt.specs import DataSpec, ModelSpec
from llmopt_evals.answers import Answers
from llmopt_evals.entries import DENSE, Setting, divided, settings

ROWS = {"samples": 64}                                  # of --data


class Text(NamedTuple):
    """A context [1, T], and what is asked of it: (question and answer [1, n], tokens of the answer)."""

    context: Tensor
    asked: list[tuple[Tensor, int]]


@dataclass
class Cost(Answers):
    """The answers under one trial. beside: bytes of what its caches hold beside keys and values."""

    beside: int = 0


def texts_of(file: str, tokenizer: Any, limit: int | None) -> Iterator[Text]:
    """The contexts of a file, each with what its lines ask."""
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    lines = map(json.loads, itertools.islice(Path(file).read_text().splitlines(), limit))
    for context, entries in itertools.groupby(lines, key=lambda entry: entry["context"]):
        asked = [(ids(entry["question"]), ids(entry["answer"])) for entry in entries]
        yield Text(torch.tensor([first + ids(context)]), [(torch.tensor([q + a]), len(a)) for q, a in asked])


@torch.inference_mode()
def costs(model: nn.Module, texts: list[Text], trials: list[tuple[tuple[RuntimeMethod, Record], ...]]) -> list[Cost]:
    """What each trial costs, a list of methods that are in force together with what their `plan` recorded."""
    found = [Cost() for _ in trials]
    with copies.keeping(model):
        for text in texts:
            whole = copies.read(model, text.context)
            last = behind(model, text.context, whole)
            for cost, parts in zip(found, trials, strict=True):
                with whole.compressed(*parts) as cache:
                    cost.hold(cache)
                    cost.beside += cache.nbytes() - cache.entry_nbytes()
                    for rest, length in text.asked:
                        after = model(rest[:, :-1], past_key_values=cache.fork()).logits
                        cost.count(torch.cat([last, after], 1)[0, -length:], rest[0, -length:])
    return found


def behind(model: nn.Module, context: torch.Tensor, whole: copies.Whole) -> torch.Tensor:
    """Logits [1, 1, V] of the context's last token; where layers keep states it is read a second time in full."""
    if whole.cache.states is not None:
        return model(context, use_cache=False, logits_to_keep=1).logits
    return model(context[:, -1:], past_key_values=whole.cache.without_last()).logits


def learned(model: nn.Module, tokenizer: Any, steps: tuple[str, ...], ratios: tuple[float, ...],
            source: str | None) -> list[Setting]:
    """The methods of all entries, with what they learn from rows of `source` where they want data."""
    scores, acting, needed = divided(steps)
    if needed and source is None:
        raise LlmoptError("a method learns from text: --data FILE")
    rows = DataSpec(name="text", path=source, **ROWS) if needed else None
    run = Run(rows and data.load(rows, model.config, tokenizer), tokenizer=tokenizer)
    for score in scores:
        score.apply(model, run)
    return [*settings(acting, ratios, model, run)]


@click.command()
@click.argument("model")
@click.argument("file")
@click.argument("steps", nargs=-1)
@click.option("--limit", type=click.IntRange(1), help="Lines of the file; default: all.")
@click.option("--ratio", "ratios", multiple=True, default=[0.9], show_default=True,
              help="The part that goes, of entries that do not say; repeatable.")
@click.option("--data", "source", help="Text for methods that learn from some.")
@click.option("--dtype", help="float32, ...; default: as the model is stored.")
def main(model, file, steps, limit, ratios, source, dtype) -> None:
    """Nats of the answers in FILE after STEPS have dropped entries of the contexts."""
    try:
        loaded, tokenizer = load_model(ModelSpec(id=model, dtype=dtype))
        trials = [DENSE, *learned(loaded, tokenizer, steps, ratios, source)]
        texts = list(texts_of(file, tokenizer, limit))
        for trial, cost in zip(trials, costs(loaded, texts, [trial.parts for trial in trials]), strict=True):
            words = trial.words if trial.ratio is None else f"{trial.ratio:.2f}  {trial.words}"
            click.echo(f"{cost.nats:.4f}  {cost.exact:3d} of {cost.asked}  entries {cost.part:6.1%}  "
                       f"held {cost.part + cost.beside / cost.dense:6.1%}  {words}")
    except LlmoptError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
