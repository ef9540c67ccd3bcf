"""Going down a loss, batch by batch, and keeping the best state that was seen.

The state is judged on the same batches each time: before the first step, and some ten times on the way.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

LOOKS = 10          # at how many places on the way the state is judged
BETAS = (0.9, 0.99)


@dataclass
class Knobs:
    """Numbers that are moved alike. rate: at the beginning; reach: how far from 0 they may go."""

    numbers: list[Tensor]
    rate: float
    reach: float = math.inf


@dataclass(frozen=True)
class Course:
    """How to go. signs: by the sign of the slope, the rate falling evenly to 0; else by Adam, in half a cosine.

    late: True once no further step may begin.
    """

    steps: int
    signs: bool
    seed: int = 0
    late: Callable[[], bool] = lambda: False

    def share(self, step: int) -> float:
        """Of the rates, at a step."""
        done = step / self.steps
        return 1 - done if self.signs else (1 + math.cos(math.pi * done)) / 2


@torch.enable_grad()
def descend(loss: Callable[[int], Tensor], learned: Sequence[int], judged: Sequence[int], knobs: list[Knobs],
            course: Course) -> tuple[float, float]:
    """(loss before, loss after) on the batches `judged`; leaves the best state in the knobs' numbers.

    loss: of a batch by its index, times its share in all of them. learned: the batches to go by.
    """
    moved = [knob for knob in knobs if knob.rate > 0]
    way, best = _Way(moved, course), _Best(moved, partial(_judge, loss, judged))
    first = best.loss
    drawn, order = torch.Generator().manual_seed(course.seed), []
    for step in range(course.steps if way.numbers else 0):
        if course.late():
            best.look()
            break
        order = order or [learned[i] for i in torch.randperm(len(learned), generator=drawn)]
        way.go(torch.autograd.grad(loss(order.pop()), way.numbers, allow_unused=True), step)
        if (step + 1) % max(1, course.steps // LOOKS) == 0 or step + 1 == course.steps:
            best.look()
    best.restore()
    return first, best.loss


@torch.no_grad()
def _judge(loss: Callable[[int], Tensor], judged: Sequence[int]) -> float:
    return sum(float(loss(index)) for index in judged)


class _Best:
    """The state of least loss so far, the first one to begin with."""

    def __init__(self, knobs: list[Knobs], judge: Callable[[], float]):
        self.numbers, self.judge = [number for knob in knobs for number in knob.numbers], judge
        self.loss, self.kept = judge(), self._copy()

    def look(self) -> None:
        now = self.judge()
        if now < self.loss:
            self.loss, self.kept = now, self._copy()

    @torch.no_grad()
    def restore(self) -> None:
        for number, kept in zip(self.numbers, self.kept, strict=True):
            number.copy_(kept)

    def _copy(self) -> list[Tensor]:
        return [number.detach().clone() for number in self.numbers]


class _Way:
    """Moves numbers by their slopes."""

    def __init__(self, knobs: list[Knobs], course: Course):
        self.knobs, self.course = knobs, course
        self.numbers = [number.requires_grad_() for knob in knobs for number in knob.numbers]
        groups = [{"params": knob.numbers, "lr": knob.rate} for knob in knobs] or [{"params": [torch.zeros(())]}]
        self.optimizer = torch.optim.SGD(groups) if course.signs else torch.optim.Adam(groups, betas=BETAS)

    @torch.no_grad()
    def go(self, slopes: Sequence[Tensor | None], step: int) -> None:
        for number, slope in zip(self.numbers, slopes, strict=True):
            number.grad = slope.sign() if self.course.signs and slope is not None else slope
        for knob, group in zip(self.knobs, self.optimizer.param_groups, strict=False):
            group["lr"] = knob.rate * self.course.share(step)
        self.optimizer.step()
        for knob in self.knobs:
            for number in knob.numbers:
                number.grad = None
                number.clamp_(-knob.reach, knob.reach)
