"""Pieces of texts as a .jsonl: contexts for `llmopt_evals.continuations`, or rows for `--data`.

    python -m llmopt_evals.pieces MODEL FILE.jsonl TEXT TEXT --each 8 --context 1024 --answer 128
    python -m llmopt_evals.pieces MODEL DATA.jsonl TEXT TEXT --each 2 --context 2048 --answer 0

Of every text, pieces at even places: so many of the model's tokens to read first, and so many that follow. Where none
follow, a line is {"text"}, which `llmopt compress --data` reads.
"""
import json
import sys
from collections.abc import Iterator
from typing import Any

import click

from llmopt.cli.options import FILE, check_target
from llmopt.errors import LlmoptError, naming
from llmopt.files.shards import write_text
from llmopt.model.loading import load_tokenizer, read_config
from llmopt.specs import ModelSpec
from llmopt_evals.texts import documents


def pieces(path: str, tokenizer: Any, each: int, context: int, answer: int) -> Iterator[dict[str, str]]:
    """{"context", "question", "answer"} of each piece of a file, the question empty; {"text"} if there is no answer."""
    ids = tokenizer("\n\n".join(documents(path)), add_special_tokens=False).input_ids
    if len(ids) < each * (context + answer):
        raise LlmoptError(f"{len(ids):,} tokens, {each} x {context + answer:,} are wanted")
    for start in range(0, each * (len(ids) // each), len(ids) // each):
        end = start + context
        first, then = tokenizer.decode(ids[start:end]), tokenizer.decode(ids[end:end + answer])
        yield {"context": first, "question": "", "answer": then} if answer else {"text": first}


@click.command()
@click.argument("model")
@click.argument("target", type=FILE)
@click.argument("texts", nargs=-1, required=True)
@click.option("--each", type=click.IntRange(1), default=8, show_default=True, help="Pieces of a text.")
@click.option("--context", type=click.IntRange(1), default=1024, show_default=True, help="Tokens to read first.")
@click.option("--answer", type=click.IntRange(0), default=128, show_default=True,
              help="Tokens that follow; 0: none, and lines for --data.")
def main(model: str, target: str, texts: tuple[str, ...], **sizes: int) -> None:
    """Write pieces of TEXTS to TARGET."""
    try:
        check_target(target)
        tokenizer, lines = load_tokenizer(read_config(ModelSpec(id=model))[0]), []
        for path in texts:
            with naming(path):
                lines += [json.dumps(piece) + "\n" for piece in pieces(path, tokenizer, **sizes)]
        write_text(target, "".join(lines))
    except LlmoptError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
