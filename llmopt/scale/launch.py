"""What a launcher has told this process, and how several processes speak with one voice; known before torch is there.

`accelerate launch --cpu --num_processes 2` starts ONE process and does not say so (it can only start several on the
CPU through MPI): `started_alone` finds that out.
"""
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

STORE_WAIT = timedelta(seconds=5)
GRACE = 5                           # seconds


class Lost(Exception):
    """Another process of this run has ended, so that this one cannot go on."""


def count() -> int:
    """The number of processes that the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """True for rank 0 and for a process alone; known before anything is joined."""
    return int(os.environ.get("RANK", 0)) == 0 or count() == 1


def started_alone() -> bool:
    """True if `accelerate launch` has started this process, and no other."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ and count() == 1


@contextmanager
def one_voice() -> Iterator[None]:
    """Around the whole command: rank 0 alone writes to stdout; the first to fail tells why, the others end in silence.

    Connections are closed only after that, so that nobody else can be first. SIGTERM, by which a launcher ends the
    others, lets a process clean up.
    """
    if count() == 1:
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    failed = True
    try:
        with nullcontext() if is_main() else open(os.devnull, "w") as sink, redirect_stdout(sink or sys.stdout):
            yield
        failed = False
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)       # all that there is to clean has been cleaned
        if failed and not isinstance(sys.exception(), SystemExit) and not _is_first():
            time.sleep(GRACE)               # the launcher calls the first that leaves the cause, and ends the others
            sys.exit(1)


def _is_first() -> bool:
    """True if no other process of this run has asked before, or there is nobody to ask."""
    from torch.distributed import TCPStore

    place = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", 29500))
    try:
        store = TCPStore(*place, is_master=False, timeout=STORE_WAIT)
        return store.add(f"llmopt/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except RuntimeError:
        return True
