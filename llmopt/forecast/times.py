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
        return Span(min(passed, self.spent() / torch.get_num_threads()), passed)

    def spent(self) -> float:
        """Seconds of processor time of all threads together."""
        return time.process_time() - self.processor


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


class Loops:
    """A Progress that sums up, apart from all else, what loops on a model of one block take: time and memory.

    block: of loops over the block. trials: of loops over more, each item of which tries something out, inside others or
    not. peak: tells the bytes at the most since it was called last; `high_trials` are those of the trials, `high` those
    of all else.
    """

    def __init__(self, peak: Callable[[], int] = int) -> None:
        self.block = self.trials = Span()
        self.peak, self.high, self.high_trials = peak, 0, 0

    def __call__(self, items: Iterable, label: str) -> Iterator:
        items, watch, before = list(items), Watch(), self.trials
        self.look()
        yield from items
        if len(items) > 1:
            self.trials = before + watch.read()
            self.high_trials = max(self.high_trials, self.peak())
        else:
            self.block += watch.read() + (self.trials + before * -1) * -1

    def look(self) -> None:
        """What was taken since the last trials belongs to no trial."""
        self.high = max(self.high, self.peak())

    def scaled(self, spent: Span, blocks: int, forwards: float) -> Span:
        """The time for a model of so many blocks, on which a forward takes `forwards` times as long.

        Each block has as many trials as this one, which run from their block on. spent: on all there was to do; what
        belongs to no loop is done once.
        """
        once = spent + (self.block + self.trials) * -1
        return once + self.block * blocks + self.trials * (blocks * (forwards + 1) / 2)
