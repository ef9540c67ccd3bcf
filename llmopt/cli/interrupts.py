"""Ctrl-C, pressed again and again: the first ends the work, those that follow do not end its clearing up."""
import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 5        # seconds after a Ctrl-C in which further ones are passed over
LATER = 0.01        # seconds until one is tried again that came where Python lets no exception out


@contextmanager
def patient() -> Iterator[None]:
    """Inside, a Ctrl-C shortly after another does nothing; where somebody else handles them, all stays as it is.

    One that comes while an object is finalized or a process forked, where Python drops exceptions, is tried again.
    """
    before, unraisable = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return
    last = [-float("inf")]

    def interrupt(number: int, frame: object) -> None:
        if time.monotonic() - last[0] > PATIENCE:
            last[0] = time.monotonic()
            raise KeyboardInterrupt

    def again(dropped: "sys.UnraisableHookArgs") -> None:
        if dropped.exc_type is KeyboardInterrupt:
            last[0] = -float("inf")
            threading.Timer(LATER, _thread.interrupt_main).start()
        else:
            unraisable(dropped)

    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = unraisable
        signal.signal(signal.SIGINT, before)
