"""Documents of the lm-eval tasks in this folder, generated from the world's evaluation seeds; nothing is downloaded."""

import sys
from pathlib import Path

from datasets import Dataset

sys.path += map(str, Path(__file__).resolve().parents[2:4])  # lm_eval loads this file by path, installed or not

from llmopt_evals import needles  # noqa: E402
from llmopt_evals.texts import documents  # noqa: E402
from llmopt_evals.world import questions as world  # noqa: E402
from llmopt_evals.world.text import perplexity_text  # noqa: E402


def as_dataset(questions: list[world.Question]) -> dict[str, Dataset]:
    """Rows of {context, question, answer, distance, document}."""
    rows = [
        {
            "context": world.text(q.context),
            "question": world.text(q.asked),
            "answer": world.text(q.answer),
            "distance": q.distance,
            "document": q.document,
        }
        for q in questions
    ]
    return {"test": Dataset.from_list(rows)}


def recall_40_aware(**metadata):
    """40 statements; the key is part of the context."""
    return as_dataset(world.recall_questions(40, "aware"))


def recall_40_agnostic(**metadata):
    """40 statements; the context ends before `ask`."""
    return as_dataset(world.recall_questions(40, "agnostic"))


def recall_160_aware(**metadata):
    """160 statements; the key is part of the context."""
    return as_dataset(world.recall_questions(160, "aware"))


def recall_160_agnostic(**metadata):
    """160 statements; the context ends before `ask`."""
    return as_dataset(world.recall_questions(160, "agnostic"))


def facts(**metadata):
    """Facts fixed by the world's seed, which only the weights can know."""
    return as_dataset(world.fact_questions(512))


def copies(**metadata):
    """Spans of 16 words to be written again."""
    return as_dataset(world.copy_questions(100))


def perplexity(**metadata):
    """Stories, half of them with facts of the weights between the sentences."""
    return {"test": Dataset.from_list([{"text": text} for text in perplexity_text(24, 512)])}


def any_text(text: str | None = None, **metadata):
    """The file named by the metadata key `text` or by LLMOPT_TEXT: .jsonl with `text`, or split at `<|endoftext|>`."""
    return {"test": Dataset.from_list([{"text": one} for one in documents(text)])}


def needles_aware(**metadata):
    """Facts planted in the text; the question belongs to what is compressed."""
    return {"test": Dataset.from_list(list(needles.rows("aware", **metadata)))}


def needles_agnostic(**metadata):
    """Facts planted in the text; the question comes after the compression."""
    return {"test": Dataset.from_list(list(needles.rows("agnostic", **metadata)))}


def needle_figures(doc, results):
    """The figures of one answer: every token the model's first choice, and the log-likelihood."""
    (logprob, exact), = results
    return {"exact": float(exact), "logprob": logprob}
