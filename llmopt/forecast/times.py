"""How long a run will take: what its parts took, from the clock and from the processor."""
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Span:
    """Seconds of some work. low: by the processor, with all its threads at it; high: by the clock.

    The two are far apart where other work shares the machine, or where the disk was waited for.
    """

    low: float = 0.0
    high: float = 0.0

    def __add__(self, other: "Span") -> "Span":
        return Span(self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> "Span":
        return Span(self.low * factor, self.high * factor)


class Watch:
    """A stopwatch that runs from the moment it is made."""

    def __init__(self) -> None:
        self.clock, self.processor = time.perf_counter(), time.process_time()

    def read(self) -> Span:
        passed = time.perf_counter() - self.clock
        return Span(min(passed, (time.process_time() - self.processor) / torch.get_num_threads()), passed)


def timed(do: Callable, *given: Any) -> Span:
    """The time that `do(*given)` takes."""
    watch = Watch()
    do(*given)
    return watch.read()


@dataclass
class Times:
    """The time of each part of a run, and where the figure comes from."""

    parts: list[list] = field(default_factory=list)         # [part, seconds at best, at worst, origin]

    def add(self, part: str, span: Span, origin: str) -> None:
        self.parts.append([part, round(span.low, 3), round(span.high, 3), origin])

    @property
    def total(self) -> list[float]:
        """Seconds, from low to high."""
        return [sum(part[which] for part in self.parts) for which in (1, 2)]


class Trials:
    """A Progress that adds up the time of loops over more items than there are blocks: they try out the whole model."""

    def __init__(self, blocks: int):
        self.blocks, self.spent = blocks, Span()

    def __call__(self, items: Iterable, label: str) -> Iterator:
        items, watch = list(items), Watch()
        yield from items
        if len(items) > self.blocks:
            self.spent += watch.read()
