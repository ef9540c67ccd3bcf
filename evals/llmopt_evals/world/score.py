"""Greedy accuracy on questions and loss on stories, without lm-eval."""

from itertools import groupby

import torch
from torch.nn.functional import cross_entropy

from .questions import Question
from .stories import Story


@torch.no_grad()
def accuracy(model: torch.nn.Module, questions: list[Question], context: bool = True, batch: int = 512) -> float:
    """Share of questions whose every answer token is the most likely one; `context=False` leaves only BOS."""
    right = 0
    for _, group in groupby(questions, key=lambda q: len(q.context)):
        group = list(group)
        for start in range(0, len(group), batch):
            right += _right(model, group[start : start + batch], context)
    return right / len(questions)


def _right(model: torch.nn.Module, group: list[Question], context: bool) -> int:
    rows = [(q.context if context else q.context[:1]) + q.asked + q.answer for q in group]
    ids = torch.tensor(rows, device=model.device)  # [B, T]
    size = len(group[0].answer)
    guessed = model(ids[:, :-1], logits_to_keep=size).logits.argmax(-1)
    return int((guessed == ids[:, -size:]).all(-1).sum())


@torch.no_grad()
def story_ratio(model: torch.nn.Module, stories: list[Story]) -> tuple[float, float]:
    """Nats per token of the model on stories of one length, and of the generator on the same tokens."""
    ids = torch.tensor([story.ids for story in stories], device=model.device)
    logits = model(ids).logits[:, :-1].float()
    loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    exact = -sum(sum(story.logp) for story in stories) / ids[:, 1:].numel()
    return loss, exact
