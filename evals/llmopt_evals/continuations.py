"""What dropping entries of a context costs the text that follows: nats a token, with and without.

    python -m llmopt_evals.continuations MODEL FILE.jsonl --limit 24 "kv.snapkv: {window: 16, allocate: ada}"

A line of the file is {"context", "question", "answer"}. The context alone is read with the methods in force, then
question and answer on what was kept, at their true places; the answer's tokens count. Each argument after the file is
one entry of a recipe's `steps`, or a list of them; `ratio` is added where an entry has none.
"""
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from llmopt import runtime
from llmopt.errors import LlmoptError
from llmopt.model.loading import load_model
from llmopt.specs import ModelSpec
from llmopt_evals.entries import made

DENSE = "dense"


def pieces(file: str, tokenizer, limit: int | None) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(context [1, T], question and answer [1, n], tokens of the answer) of each line."""
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for line in itertools.islice(Path(file).read_text().splitlines(), limit):
        entry = json.loads(line)
        context, question, answer = (tokenizer(entry[part], add_special_tokens=False).input_ids
                                     for part in ("context", "question", "answer"))
        yield torch.tensor([first + context]), torch.tensor([question + answer]), len(answer)


@torch.inference_mode()
def cost(model: nn.Module, texts: list[tuple[Tensor, Tensor, int]], *methods) -> tuple[float, float]:
    """(nats for each token of the answers, part of the contexts' bytes that is held, positions included)."""
    loss = tokens = held = dense = 0.0
    with ExitStack() as inside:
        if methods:
            inside.enter_context(runtime.attached(model, *methods))
        for context, rest, length in texts:
            before = model(context, use_cache=True)
            cache = before.past_key_values
            if methods:
                held, dense = held + cache.nbytes(), dense + cache.dense_nbytes()
            with runtime.frozen(model) if methods else ExitStack():
                after = model(rest[:, :-1], past_key_values=cache, use_cache=True)
            logits = torch.cat([before.logits[:, -1:], after.logits], 1)[0, -length:].float()
            loss += cross_entropy(logits, rest[0, -length:], reduction="sum").item()
            tokens += length
    return loss / tokens, held / dense if dense else 1.0


@click.command()
@click.argument("model")
@click.argument("file")
@click.argument("steps", nargs=-1)
@click.option("--limit", type=click.IntRange(1), help="Lines of the file; default: all.")
@click.option("--ratio", default=0.9, show_default=True, help="The part that goes, of entries that do not say.")
def main(model: str, file: str, steps: tuple[str, ...], limit: int | None, ratio: float) -> None:
    """Nats of the answers in FILE after STEPS have dropped entries of the contexts."""
    try:
        loaded, tokenizer = load_model(ModelSpec(id=model))
        texts = list(pieces(file, tokenizer, limit))
        click.echo(f"{cost(loaded, texts)[0]:.4f}  100.0 %  {DENSE}")
        for words in steps:
            nats, held = cost(loaded, texts, *made(words, ratio))
            click.echo(f"{nats:.4f}  {held:6.1%}  {words}")
    except LlmoptError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
