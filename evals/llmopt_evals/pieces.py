"""Pieces of texts as a .jsonl that `llmopt_evals.continuations` reads, and programs of others beside it.

    python -m llmopt_evals.pieces MODEL FILE.jsonl TEXT TEXT --each 8 --context 1024 --answer 128

Of every text, pieces at even places: so many of the model's tokens to read first, and so many that follow.
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
    """{"context", "question", "answer"} of each piece of a file; the question is empty."""
    ids = tokenizer("\n\n".join(documents(path)), add_special_tokens=False).input_ids
    if len(ids) < each * (context + answer):
        raise LlmoptError(f"{len(ids):,} tokens, {each} x {context + answer:,} are wanted")
    for start in range(0, each * (len(ids) // each), len(ids) // each):
        parts = ids[start:start + context], ids[start + context:start + context + answer]
        yield {"context": tokenizer.decode(parts[0]), "question": "", "answer": tokenizer.decode(parts[1])}


@click.command()
@click.argument("model")
@click.argument("target", type=FILE)
@click.argument("texts", nargs=-1, required=True)
@click.option("--each", type=click.IntRange(1), default=8, show_default=True, help="Pieces of a text.")
@click.option("--context", type=click.IntRange(1), default=1024, show_default=True, help="Tokens to read first.")
@click.option("--answer", type=click.IntRange(1), default=128, show_default=True, help="Tokens that follow.")
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
