"""Needles: facts planted in any text, with the model's own tokenizer, asked before or after the context is compressed.

    python -m llmopt_evals.needles --text FILE --model MODEL --lengths 1024,2048
    python -m llmopt_evals.needles --text FILE --model MODEL --lengths 512 --probes probes.jsonl

A document is `length` tokens of the text with facts at even depths: "The pass code of the amber falcon is 4821." With
`--facts words` answers are common words, in sentences of eight forms; `mixed` is half of each. A document ends in a
question about one fact, whose answer is teacher-forced: `exact` is the share of answers of which every token is the
model's first choice, `logprob` the mean log-likelihood of an answer. `needles_aware` compresses context
and question together, as if the question were known; `needles_agnostic` compresses the context and asks all questions
of that one finished cache. Where nothing is compressed both read a question in the same place, in other words: lm-eval
keeps answers by their words. `--probes` writes them as probes for head scores instead. A text that is too short is
read again from its start. Everything follows from the seed.
"""
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, cycle, islice
from random import Random
from typing import Any

import click

from llmopt.cli.options import FILE, check_target
from llmopt.errors import LlmoptError, closest
from llmopt_evals.facts import FORMS, THINGS, Fact, drawn, one_of_each_form
from llmopt_evals.texts import documents

LONGEST = 40                            # words of a sentence; longer ones are cut
SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|\n{2,}")
DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class Plan:
    """The trials: numbers of documents, their lengths (tokens, question and answer included), needles in each and
    what they say: codes, words or mixed."""

    lengths: Sequence[int] = ()         # none: DEFAULT_LENGTH, or what the model reads
    documents: int = 4
    needles: int = 8
    seed: int = 0
    facts: str = "codes"

    def __post_init__(self) -> None:
        if self.facts not in FORMS:
            raise LlmoptError(f"needles: facts: {self.facts!r} given, one of {', '.join(FORMS)} expected"
                              f"{closest(str(self.facts), FORMS)}")
        most = {"documents": 10_000, "needles": len(THINGS)}
        for key, value in [("lengths", length) for length in self.lengths] + [(k, getattr(self, k)) for k in most]:
            if not isinstance(value, int) or not 1 <= value <= most.get(key, value):
                raise LlmoptError(f"needles: {key}: {value!r} given, a number from 1 to {most.get(key, 'the maximum')} "
                                  "expected")

    def sizes(self, limit: int) -> list[int]:
        """The lengths, held against the model's maximum."""
        for length in self.lengths:
            if length > limit:
                raise LlmoptError(f"needles: a length of {length:,} tokens; the model reads at most {limit:,}")
        return list(self.lengths) or [min(DEFAULT_LENGTH, limit)]


FIELDS = [field.name for field in fields(Plan)]


class Writer:
    """Documents of a text, counted in the tokens of one tokenizer."""

    def __init__(self, text: list[str], tokenizer: Any, plan: Plan):
        self.tokenizer, self.plan = tokenizer, plan
        self.sentences = [part for document in text for part in sentences(document)]
        told = " ".join(fact.told for fact in drawn(plan.facts, len(FORMS[plan.facts]), Random(0)))
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in self._ids(told):
            raise LlmoptError("needles: this tokenizer has no words for them (llmopt/reference: ask world_recall)")

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def document(self, index: int, length: int) -> tuple[str, list[tuple[Fact, float]]]:
        """(the text with its needles, (fact, depth) of each)."""
        random = Random(f"{self.plan.seed} {length} {index}")
        count = self.plan.needles
        facts = drawn(self.plan.facts, count, random)
        last = max((f"{fact.asked('agnostic')}  {fact.answer}" for fact in one_of_each_form(facts)), key=len)
        room = length - len(self._ids(" ".join([*(fact.told for fact in facts), last]))) - count - 8
        hay = self._hay(random.randrange(len(self.sentences)), room)
        depths = [(i + 0.5) / count for i in range(count)]
        text = plant(hay, [fact.told for fact in facts], depths, [len(self._ids(part)) for part in hay])
        return text, list(zip(facts, depths, strict=True))

    def _hay(self, start: int, room: int) -> list[str]:
        """Sentences from `start` on, round and round, that take at most `room` tokens."""
        found, left = [], room
        for sentence in islice(cycle(self.sentences), start, None):
            left -= len(self._ids(f" {sentence}"))
            if left < 0:
                break
            found.append(sentence)
        if len(found) < self.plan.needles:
            raise LlmoptError(f"needles: {self.plan.needles} of them leave no room for text between; longer documents "
                              "or fewer needles")
        return found


def sentences(document: str) -> list[str]:
    """The sentences of a text, long ones in pieces."""
    words = (part.split() for part in SENTENCE.split(document))
    return [" ".join(part[i:i + LONGEST]) for part in words for i in range(0, len(part), LONGEST)]


def plant(hay: list[str], needles: list[str], depths: list[float], sizes: list[int]) -> str:
    """The sentences with each needle behind the one that ends nearest its depth; sizes: tokens of each sentence."""
    ends = list(accumulate(sizes))
    behind: dict[int, list[str]] = {}
    for needle, depth in zip(needles, depths, strict=True):
        nearest = min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))
        behind.setdefault(nearest, []).append(needle)
    return " ".join(part for i, sentence in enumerate(hay) for part in (sentence, *behind.get(i, [])))


def rows(form: str, text: str | None = None, **metadata: Any) -> Iterator[dict[str, Any]]:
    """The rows of a task, from what lm-eval calls metadata.

    text: a file. metadata: the fields of Plan; `tokenizer` or `pretrained`, a model's folder or hub name, or `reader`,
    a function that returns (tokenizer, the model's maximum).
    """
    plan = Plan(**{key: metadata[key] for key in FIELDS if key in metadata})
    words, limit = metadata["reader"]() if "reader" in metadata else _model(metadata)
    writer = Writer(documents(text), words, plan)
    for length in plan.sizes(limit):
        for index in range(plan.documents):
            context, planted = writer.document(index, length)
            for fact, depth in planted:
                yield {"context": context, "question": fact.asked(form), "answer": fact.answer, "depth": depth,
                       "length": length, "document": index,
                       "compressed_context": context if form == "agnostic" else None}


def probes(text: str, name: str, plan: Plan) -> Iterator[dict[str, str]]:
    """{"context", "question", "answer", "corrupted"} of every needle, as `probe: FILE.jsonl` reads them.

    corrupted: the context with another answer there, the same number of tokens.
    """
    words, limit = _model({"tokenizer": name})
    writer, random = Writer(documents(text), words, plan), Random(f"{plan.seed} corrupted")
    for length in plan.sizes(limit):
        for index in range(plan.documents):
            context, planted = writer.document(index, length)
            for fact, _ in planted:
                others = (context.replace(fact.told, fact.other(random).told) for _ in range(100))
                wanted = len(writer._ids(context))
                corrupted = next((other for other in others if other != context and len(writer._ids(other)) == wanted),
                                 None)
                yield {"context": context, "question": fact.asked("agnostic"), "answer": f" {fact.answer}",
                       **({"corrupted": corrupted} if corrupted else {})}


def _model(metadata: dict[str, Any]) -> tuple[Any, int]:
    """(tokenizer, the most tokens that it reads) of the model that the metadata name."""
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    if not name:
        raise LlmoptError("needles are counted in a model's tokens: --metadata '{\"tokenizer\": FOLDER_OR_NAME}'")
    from llmopt.model.loading import load_tokenizer, read_config
    from llmopt.specs import ModelSpec

    source, config = read_config(ModelSpec(id=str(name)))
    return load_tokenizer(source), config.get_text_config().max_position_embeddings


def lengths_of(given: str) -> list[int]:
    """Numbers with commas between them."""
    if not re.fullmatch(r"\d+(,\d+)*", given):
        raise LlmoptError(f"--lengths: {given!r} given, numbers such as 1024,4096 expected")
    return [int(length) for length in given.split(",")]


@click.command()
@click.option("--text", required=True, help="The file to plant needles in; .jsonl with `text`, or plain text.")
@click.option("--model", "names", multiple=True, default=["llmopt/reference"], help="Folder or hub name; repeatable.")
@click.option("--lengths", default=str(DEFAULT_LENGTH), show_default=True, help="Tokens of a document: 1024,4096.")
@click.option("--documents", default=4, show_default=True, help="How many of each length.")
@click.option("--needles", default=8, show_default=True, help="How many in each document.")
@click.option("--facts", default="codes", show_default=True, help="What answers are: codes, words or mixed.")
@click.option("--seed", default=0, show_default=True)
@click.option("--probes", "target", type=FILE, help="Write the needles to this .jsonl file, for `probe`, and stop.")
@click.option("--json", "as_json", is_flag=True)
def command(text, names, lengths, target, as_json, **options) -> None:
    """Ask models for facts planted in a text, before and after their cache is compressed."""
    from llmopt.cli import tables
    from llmopt.files.shards import write_text
    from llmopt.specs import ModelSpec
    from llmopt_evals.evaluate import column, evaluate

    tables.quiet_libraries()
    try:
        options["lengths"] = lengths_of(lengths)
        if target:
            check_target(target)
            lines = [json.dumps(line) for line in probes(text, names[0], Plan(**options))]
            write_text(target, "\n".join(lines) + "\n")
            return
        columns = {name: column(evaluate(ModelSpec(id=name), ["needles"], text=text, options=options))
                   for name in names}
        tables.show_scores(columns, as_json)
    except LlmoptError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    command()
