"""What a process takes of the memory: read once, and watched for a while.

private: pages that only swap could take back (on Linux the Private_* of smaps_rollup without mapped files; the USS of
psutil elsewhere). mapped: pages of files, which the system drops when it needs them.
"""
import os
import threading
from typing import NamedTuple

import psutil

EVERY = 0.01        # seconds between two looks; one takes a tenth of a millisecond


class Taken(NamedTuple):
    """Bytes."""

    private: int = 0
    mapped: int = 0

    def above(self, base: "Taken") -> "Taken":
        return Taken(max(0, self.private - base.private), max(0, self.mapped - base.mapped))


def taken(process: psutil.Process) -> Taken:
    """The memory that one process takes now."""
    if not psutil.LINUX:
        return Taken(process.memory_full_info().uss)
    info = process.memory_info()                # counters of the kernel; smaps_rollup would walk through all pages
    return Taken(info.rss - info.shared, info.shared)


class Gauge:
    """Watches this process from a thread of its own: `with Gauge() as gauge: ...`, then gauge.peak.

    peak: above what was taken at the start, at the moment of most private memory. What passes within EVERY is missed.
    """

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.start = self.peak = self.recent = Taken()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Gauge":
        self.start = taken(self.process)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(EVERY):
            self.look()

    def look(self) -> Taken:
        """Look now; the peak so far."""
        now = self.now()
        self.peak, self.recent = max(self.peak, now), max(self.recent, now)
        return self.peak

    def now(self) -> Taken:
        """What is taken at this moment, above the start."""
        return taken(self.process).above(self.start)

    def lap(self) -> Taken:
        """The peak since the last call of `lap`, or since the start."""
        self.look()
        found, self.recent = self.recent, Taken()
        return found


def whole_pages() -> None:
    """Have torch keep tensors of 2 MB and more apart from small ones, in huge pages where there are any.

    To be called before it makes the first. Freed, they go back at once, instead of leaving the heap full of holes.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
