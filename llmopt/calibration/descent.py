"""Going down a loss, batch by batch, and keeping the best state that was seen.

The state is judged on the same batches each time: before the first step, and some ten times on the way. Where it is
kept as well, a descent that was cut off goes on behind the last of these times.
"""
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from llmopt.progress import Progress, silent

LOOKS = 10          # at how many places on the way the state is judged
BETAS = (0.9, 0.99)
HELD, LEAST = 8, 4              # every which batch is held out, and of how many at least
State = tuple[dict[str, Tensor], dict[str, Any]]            # tensors, and plain data beside them


@dataclass
class Knobs:
    """Numbers that are moved alike. rate: at the beginning; reach: how far from 0 they may go."""

    numbers: list[Tensor]
    rate: float
    reach: float = math.inf


@dataclass(frozen=True)
class Course:
    """How to go. signs: by the sign of the slope, the rate falling evenly to 0; else by Adam, in half a cosine.

    late: True once no further step may begin. warm: steps over which the rate first rises.
    """

    steps: int
    signs: bool
    seed: int = 0
    late: Callable[[], bool] = lambda: False
    betas: tuple[float, float] = BETAS
    warm: int = 0
    progress: Progress = silent

    def share(self, step: int) -> float:
        """Of the rates, at a step."""
        done, risen = step / self.steps, min(1.0, (step + 1) / (self.warm + 1))
        return risen * (1 - done if self.signs else (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class Kept:
    """Where the state is kept: `load` gives the last one that `save` was given."""

    load: Callable[[], State | None]
    save: Callable[[dict[str, Tensor], dict[str, Any]], None]


@torch.enable_grad()
def descend(loss: Callable[[int], Tensor], learned: Sequence[int], judged: Sequence[int], knobs: list[Knobs],
            course: Course, kept: Kept | None = None) -> tuple[float, float]:
    """(loss before, loss after) on the batches `judged`; leaves the best state in the knobs' numbers.

    loss: of a batch by its index, times its share in all of them. learned: the batches to go by.
    """
    moved, found = [knob for knob in knobs if knob.rate > 0], kept.load() if kept else None
    way, best = _Way(moved, course), _Best(moved, partial(_judge, loss, judged), found)
    start = way.resume(found) if found else 0
    steps = range(start, course.steps if way.numbers else 0)
    for step, index in zip(course.progress(steps, "steps"), islice(_order(learned, course.seed), start, None),
                           strict=False):
        if course.late():
            best.look()
            break
        way.go(torch.autograd.grad(loss(index), way.numbers, allow_unused=True), step)
        if (step + 1) % max(1, course.steps // LOOKS) == 0 or step + 1 == course.steps:
            best.look()
            if kept:
                kept.save(way.state() | best.state(), {"step": step + 1, "first": best.first, "loss": best.loss})
    best.restore()
    return best.first, best.loss


def split(count: int) -> tuple[list[int], list[int]]:
    """The batches to learn from, and those to judge by; few batches are both."""
    judged = list(range(0, count, HELD)) if count >= LEAST else list(range(count))
    return [index for index in range(count) if count < LEAST or index not in judged], judged


def _order(learned: Sequence[int], seed: int) -> Iterator[int]:
    """The batches, all of them in one random order after the other."""
    drawn = torch.Generator().manual_seed(seed)
    while True:
        yield from reversed([learned[i] for i in torch.randperm(len(learned), generator=drawn)])


@torch.no_grad()
def _judge(loss: Callable[[int], Tensor], judged: Sequence[int]) -> float:
    return sum(float(loss(index)) for index in judged)


class _Best:
    """The state of least loss so far, the first one to begin with."""

    def __init__(self, knobs: list[Knobs], judge: Callable[[], float], found: State | None):
        self.numbers, self.judge = [number for knob in knobs for number in knob.numbers], judge
        if found is None:
            self.first = self.loss = judge()
            self.kept = self._copy()
        else:
            tensors, told = found
            self.first, self.loss = told["first"], told["loss"]
            self.kept = [tensors[f"{i}.best"] for i in range(len(self.numbers))]

    def look(self) -> None:
        now = self.judge()
        if now < self.loss:
            self.loss, self.kept = now, self._copy()

    def state(self) -> dict[str, Tensor]:
        return {f"{i}.best": kept for i, kept in enumerate(self.kept)}

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
        self.optimizer = torch.optim.SGD(groups) if course.signs else torch.optim.Adam(groups, betas=course.betas)

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

    def state(self) -> dict[str, Tensor]:
        """The numbers, and what the optimizer knows of them."""
        found = {}
        for i, number in enumerate(self.numbers):
            found[f"{i}"] = number.detach()
            found |= {f"{i}.{name}": value for name, value in self.optimizer.state.get(number, {}).items()}
        return found

    @torch.no_grad()
    def resume(self, found: State) -> int:
        """Go on from a state; the step that comes next."""
        tensors, told = found
        for i, number in enumerate(self.numbers):
            number.copy_(tensors[f"{i}"])
            own = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{i}.")}
            own.pop("best")
            self.optimizer.state[number] = {name: value.clone() for name, value in own.items()}
        return told["step"]
