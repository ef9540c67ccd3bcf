"""Going down a loss, batch by batch, and keeping the best state that was seen.

The state is judged on the same batches each time: before the first step, and some ten times on the way.
"""
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LOOKS = 10          # at how many places on the way the state is judged


@dataclass
class Knobs:
    """Numbers that are moved alike. rate: at the beginning; reach: how far from 0 they may go."""

    numbers: list[Tensor]
    rate: float
    reach: float = float("inf")


@dataclass(frozen=True)
class Course:
    """How to go. signs: by the sign of the slope, else by Adam; shape: of the rate, from 1 to 0 along the way."""

    steps: int
    signs: bool
    shape: Callable[[float], float]
    seed: int = 0
    until: float = float("inf")             # of the clock, time.monotonic: no step begins after it


@torch.enable_grad()
def descend(loss: Callable[[int], Tensor], learned: Sequence[int], judged: Sequence[int], knobs: list[Knobs],
            course: Course) -> tuple[float, float]:
    """(loss before, loss after) on the batches `judged`; leaves the best state in the knobs' numbers.

    loss: of a batch by its index, times its share in all of them. learned: the batches to go by.
    """
    moved = [knob for knob in knobs if knob.rate > 0 and knob.numbers]
    every = [number for knob in moved for number in knob.numbers]
    steps = _Steps(moved, course.signs)
    first = least = _judge(loss, judged)
    best, drawn = [number.detach().clone() for number in every], torch.Generator().manual_seed(course.seed)
    order: list[int] = []
    look = max(1, course.steps // LOOKS)
    for step in range(course.steps if every else 0):
        late = time.monotonic() > course.until
        if not late:
            order = order or [learned[i] for i in torch.randperm(len(learned), generator=drawn)]
            slopes = torch.autograd.grad(loss(order.pop()), every, allow_unused=True)
            steps.go(slopes, course.shape(step / course.steps))
        if late or (step + 1) % look == 0 or step + 1 == course.steps:
            now = _judge(loss, judged)
            if now < least:
                least, best = now, [number.detach().clone() for number in every]
        if late:
            break
    with torch.no_grad():
        for number, kept in zip(every, best, strict=True):
            number.copy_(kept)
    return first, least


@torch.no_grad()
def _judge(loss: Callable[[int], Tensor], judged: Sequence[int]) -> float:
    return sum(float(loss(index)) for index in judged)


class _Steps:
    """Moves numbers by their slopes."""

    def __init__(self, knobs: list[Knobs], signs: bool):
        self.knobs, self.signs = knobs, signs
        for number in (number for knob in knobs for number in knob.numbers):
            number.requires_grad_()
        groups = [{"params": knob.numbers, "lr": knob.rate} for knob in knobs]
        self.optimizer = torch.optim.SGD(groups) if signs else torch.optim.Adam(groups, betas=(0.9, 0.99))

    def go(self, slopes: Sequence[Tensor | None], share: float) -> None:
        """One step at this share of the rates."""
        rest = iter(slopes)
        for knob, group in zip(self.knobs, self.optimizer.param_groups, strict=True):
            group["lr"] = knob.rate * share
            for number in knob.numbers:
                slope = next(rest)
                number.grad = slope.sign() if self.signs and slope is not None else slope
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for knob in self.knobs:
                for number in knob.numbers if knob.reach < float("inf") else ():
                    number.clamp_(-knob.reach, knob.reach)
