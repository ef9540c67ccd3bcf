"""Contexts with questions about them, in a model's tokens: a text with planted facts, or documents of the world."""
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmopt_evals.lm import common
from llmopt_evals.needles import Plan, Writer
from llmopt_evals.world import questions as world

FORMS = ("agnostic", "aware")           # asked of a finished cache, or known when the cache is made smaller


class Question(NamedTuple):
    """Token ids of a question and its answer, which is at least one token."""

    asked: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Context:
    """Token ids of a text, and the questions about it in each form."""

    ids: list[int]
    questions: dict[str, list[Question]]


def of_text(text: list[str], tokenizer: Any, plan: Plan, limit: int, forms: tuple[str, ...]) -> Iterator[Context]:
    """The documents of `needles`; limit: tokens that the model reads."""
    writer = Writer(text, tokenizer, plan)
    for length in plan.sizes(limit):
        for index in range(plan.documents):
            context, planted = writer.document(index, length)
            yield _cut(tokenizer, context, {form: [(fact.asked(form), f" {fact.answer}") for fact, _ in planted]
                                            for form in forms})


def _cut(tokenizer: Any, context: str, questions: dict[str, list[tuple[str, str]]]) -> Context:
    """The tokens that all have in common are the context: a question may take a piece of its last token."""
    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    first = ids(context)
    wholes = {form: [(ids(context + asked), ids(context + asked + answer)) for asked, answer in pairs]
              for form, pairs in questions.items()}
    size = min(common(first, whole) for pairs in wholes.values() for _, whole in pairs)
    return Context(first[:size], {form: [Question(whole[size:len(asked)], whole[len(asked):]) for asked, whole in pairs]
                                  for form, pairs in wholes.items()})


def of_world(statements: int, documents: int, each: int, forms: tuple[str, ...], seed: int = 0) -> Iterator[Context]:
    """Documents of so many statements among stories, as in the task world_recall, `each` questions about every one."""
    asked = {form: world.recall_questions(statements, form, documents, each, seed) for form in forms}
    for start in range(0, documents * each, each):
        yield Context(list(asked[forms[0]][start].context),
                      {form: [Question(list(q.asked), list(q.answer)) for q in found[start:start + each]]
                       for form, found in asked.items()})
