"""What a model still answers under sparse prefill, and how long it reads until the first token.

Documents of the embedded world hold their questions: strewn through the text, each behind the statement that it asks
for, in every second document, and at its end in the others. All is one prompt; an answer is right if it is the model's
first choice behind the question. Other models read a text with planted facts (`needles`), and each question as a
further turn of the same conversation; answers are written token by token. CPU time of one thread.
"""
import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmopt.attention.base import Selector
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.runtime.attach import attach, attachment, detach
from llmopt_evals import contexts
from llmopt_evals.contexts import Question
from llmopt_evals.needles import Plan as Planted
from llmopt_evals.texts import documents
from llmopt_evals.world.documents import RECALL, recall_row
from llmopt_evals.world.seeds import generator


@dataclass(frozen=True)
class Text:
    """Token ids; places of answers among them, each of one token; and questions to be asked behind them."""

    ids: list[int]
    places: list[int]
    questions: list[Question]


def of_world(length: int, count: int, seed: int = 0) -> Iterator[Text]:
    """Documents of a statement for every eight tokens; odd ones ask at their end."""
    for number in range(count):
        random = generator("eval", "sparse prefill", length, seed, number)
        row = recall_row(random, length, max(1, min(256, length // 8)), strewn=number % 2 == 0)
        yield Text(row.ids, [place for place, kind in enumerate(row.kinds) if kind == RECALL], [])


def of_file(path: str, tokenizer: Any, length: int, count: int, limit: int) -> Iterator[Text]:
    """Texts of a file with eight planted facts each."""
    if length > limit:
        raise LlmoptError(f"--length: {length:,} tokens; the model reads at most {limit:,}")
    for text in contexts.of_text(documents(path), tokenizer, Planted((length,), count), limit, ("agnostic",)):
        yield Text(text.ids, [], text.questions["agnostic"])


@dataclass
class Tally:
    """What one setting has answered: exact of `asked`; CPU seconds of each text; pairs computed and causal."""

    exact: int = 0
    asked: int = 0
    seconds: list[float] = field(default_factory=list)
    computed: float = 0.0
    causal: float = 0.0


def measure(model: nn.Module, texts: Sequence[Text], methods: Sequence[Selector], run: Run) -> list[dict[str, Any]]:
    """A row for dense attention and one for each method: {"method", "fields", "exact", "asked", "density", "seconds" of
    a text, "faster": median of the texts' ratios}.
    """
    before, tallies = torch.get_num_threads(), [Tally() for _ in range(len(methods) + 1)]
    records = [method.plan(model, run) for method in methods]
    try:
        torch.set_num_threads(1)
        _read(model, texts[0], Tally())                          # what the first forward alone has to do
        for text in run.progress(texts, "texts"):
            _read(model, text, tallies[0])
            for method, record, tally in zip(methods, records, tallies[1:], strict=True):
                attach(model, method, record)
                _read(model, text, tally)
                for counter in attachment(model).stats.values():
                    tally.computed += float(counter.computed.double().mean())
                    tally.causal += counter.causal
                detach(model)
    finally:
        detach(model)
        torch.set_num_threads(before)
    return [_row(None, tallies[0], tallies[0]), *(_row(method, tally, tallies[0])
                                                  for method, tally in zip(methods, tallies[1:], strict=True))]


def _row(method: Selector | None, tally: Tally, dense: Tally) -> dict[str, Any]:
    ratios = sorted(one / other for one, other in zip(dense.seconds, tally.seconds, strict=True))
    return {"method": "dense" if method is None else method.name,
            "fields": {} if method is None else method.to_dict()[method.name], "exact": tally.exact,
            "asked": tally.asked, "density": tally.computed / tally.causal if tally.causal else 1.0,
            "seconds": sum(tally.seconds) / len(tally.seconds), "faster": ratios[len(ratios) // 2]}


@torch.inference_mode()
def _read(model: nn.Module, text: Text, tally: Tally) -> None:
    """Read a text, and count what is answered."""
    ids, start = torch.tensor([text.ids]), time.process_time()
    asking = torch.tensor([place - 1 for place in text.places] or [len(text.ids) - 1])
    read = model(ids, use_cache=bool(text.questions), logits_to_keep=asking)
    tally.seconds.append(time.process_time() - start)
    if text.places:
        tally.exact += int((read.logits[0].argmax(-1) == ids[0, text.places]).sum())
        tally.asked += len(text.places)
    for question in text.questions:
        cache = copy.deepcopy(read.past_key_values)
        tally.exact += _answers(model, cache, question)
        tally.asked += 1


def _answers(model: nn.Module, cache: Any, question: Question) -> bool:
    """Is every token of the answer the first choice behind the ones before it?"""
    step = torch.tensor([question.asked])
    for token in question.answer:
        if int(model(step, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax()) != token:
            return False
        step = torch.tensor([[token]])
    return True
