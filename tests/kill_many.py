"""Runs that are killed over and over, in children of one process that has imported everything: JSON jobs on stdin.

A job: {"recipe", "output", "stream", "kills": [...]}; a kill is a number n (SIGKILL before the n-th call that a crash
could fall between: fsync, rename, truncate) or {"seconds": s}. After the kills the run is resumed to its end. The
answer: of every job the list of exit codes, minus the signal where there was one. The first job is never killed.
"""
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from threading import RLock

import torch
from tqdm import tqdm

import llmopt  # noqa: F401  fills the registry
from llmopt import recipe
from llmopt.run import pipeline
from llmopt.run.marks import is_finished
from llmopt.run.opening import Streaming

TORN = ("fsync", "replace", "truncate", "rename")


def die_at(count: int) -> None:
    """SIGKILL this process before the `count`-th of its calls that a crash could fall between."""
    left = [count]

    def counted(call):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return wrapped

    for name in TORN:
        setattr(os, name, counted(getattr(os, name)))


def die_after(seconds: float) -> None:
    def wait():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def run(job: dict) -> int:
    streaming = Streaming(job["stream"], activations=1 << 14)
    plan, output = recipe.load(job["recipe"]), Path(job["output"])
    try:
        if is_finished(output, plan):              # as the command does
            pipeline.journal_of(output).remove()
        else:
            pipeline.run(plan, output, streaming=streaming, resume=True)
    except (Exception, KeyboardInterrupt):      # noqa: BLE001  whatever it is, the parent must hear of it
        traceback.print_exc()
        return 1
    return 0


def attempt(job: dict, kill: int | dict | None) -> int:
    """One run in a child; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        if isinstance(kill, dict):
            die_after(kill["seconds"])
        elif kill is not None:
            die_at(kill)
        os._exit(run(job))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)            # threads do not survive a fork
    tqdm.monitor_interval = 0
    tqdm.set_lock(RLock())              # its own is a semaphore of all children, which a killed one takes with it
    first, *jobs = json.load(sys.stdin)
    codes = [[run(first)]]              # in this process: the children inherit all that is imported on the way
    codes += [[attempt(job, kill) for kill in [*job["kills"], None]] for job in jobs]
    sys.stdout.write(json.dumps(codes))
