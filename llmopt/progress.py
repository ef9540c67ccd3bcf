"""Progress of loops, estimates of the time that is left, clocks, and figures in words."""
import logging
import time
from collections.abc import Callable, Iterable, Iterator

LOG = logging.getLogger(__name__)

Progress = Callable[[Iterable, str], Iterable]


def silent(items: Iterable, label: str) -> Iterable:
    """The progress that shows nothing."""
    return items


def human(size: float) -> str:
    """1234567 -> "1.23 MB" (powers of ten, as disks and hubs count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def duration(seconds: float) -> str:
    """7384 -> "2 h 3 min"; below a minute with a decimal."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def time_left(done: int, total: int, seconds: float) -> str:
    """"39.0 s, about 2 min left": how long `done` items have taken, and so what the others will."""
    if not done or done >= total:
        return duration(seconds)
    return f"{duration(seconds)}, about {duration(seconds / done * (total - done))} left"


class Spoken:
    """A Progress of log lines, for output that is no terminal: at most one every `every` seconds."""

    def __init__(self, every: float = 15):
        self.every = every

    def __call__(self, items: Iterable, label: str) -> Iterator:
        items = list(items)
        start = said = time.perf_counter()
        for done, item in enumerate(items):
            now = time.perf_counter()
            if done and now - said >= self.every:
                LOG.info("%s: %d of %d, %s", label, done, len(items), time_left(done, len(items), now - start))
                said = now
            yield item


def numbered(progress: Progress, place: str) -> Progress:
    """The progress with `place`, such as "step 2 of 5", in front of each label."""
    return lambda items, label: progress(items, f"{place}: {label}")


class Clock:
    """A Progress that tells from the first item of every loop how many seconds all its items will take."""

    def __init__(self, progress: Progress = silent):
        self.progress, self.seconds = progress, 0.0
        self.inside = 0.0               # seconds of loops that have ended, which stand inside others or do not

    def __call__(self, items: Iterable, label: str) -> Iterator:
        items = list(items)
        start, before = time.perf_counter(), self.inside
        for i, item in enumerate(self.progress(items, label)):
            if i == 1:
                self.seconds += self._own(start, before) * len(items)
            yield item
        if len(items) == 1:
            self.seconds += self._own(start, before)
        self.inside = before + time.perf_counter() - start

    def _own(self, start: float, before: float) -> float:
        """Seconds since `start`, without those of loops inside, which tell for themselves."""
        return time.perf_counter() - start - (self.inside - before)

