"""Progress of loops, and clocks."""
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Progress = Callable[[Iterable, str], Iterable]


def silent(items: Iterable, label: str) -> Iterable:
    """The progress that shows nothing."""
    return items


class Clock:
    """A Progress that tells from the first item of every loop how many seconds all its items will take."""

    def __init__(self, progress: Progress = silent):
        self.progress, self.seconds = progress, 0.0

    def __call__(self, items: Iterable, label: str) -> Iterator:
        items = list(items)
        start = time.perf_counter()
        for i, item in enumerate(self.progress(items, label)):
            if i == 1:
                self.seconds += (time.perf_counter() - start) * len(items)
            yield item
        if len(items) == 1:
            self.seconds += time.perf_counter() - start


def timed(do: Callable, *given: Any) -> float:
    """Seconds that `do(*given)` takes."""
    start = time.perf_counter()
    do(*given)
    return time.perf_counter() - start
