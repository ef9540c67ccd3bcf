"""Ctrl-C, pressed again and again: the first ends the work, those that follow do not end its clearing up."""
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 5        # seconds after a Ctrl-C in which further ones are passed over


@contextmanager
def patient() -> Iterator[None]:
    """Inside, a Ctrl-C shortly after another does nothing; where somebody else handles them, all stays as it is."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return
    last = [-float("inf")]

    def interrupt(number: int, frame: object) -> None:
        if time.monotonic() - last[0] > PATIENCE:
            last[0] = time.monotonic()
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
