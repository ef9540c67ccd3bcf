"""Running what a stranger wrote, chat templates and tokenizers, in a forked child with limits of time and memory.

A template may loop for years, a tokenizer's rules may double a text sixty times or take exponential time: no check of
the files tells these from honest ones. Where the system cannot fork there are no limits.
"""
import faulthandler
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import psutil

from llmopt.errors import LlmoptError
from llmopt.files.checks import fact_of

SECONDS, MEMORY = 5, 2**29              # CPU time and bytes that every call may take, whatever it works on
RATE, WIDTH = 50_000, 200               # further characters a second, bytes for each character


def limited(act: Callable[[], Any], what: str, characters: int = 0) -> Any:
    """What `act` gives, plain JSON data; raises LlmoptError, beginning with `what`, where it fails or takes too much.

    characters: the size of what it works on, with which the limits grow.
    """
    if not hasattr(os, "fork"):
        return act()
    seconds, memory = SECONDS + characters // RATE, MEMORY + WIDTH * characters
    with TemporaryFile() as answer:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _answer(act, answer, seconds, memory)
        status = _wait(child)
        answer.seek(0)
        told = answer.read()
    if -status in (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM):
        raise LlmoptError(f"{what}: takes more than {seconds:,} s")
    try:
        found = json.loads(told)
    except ValueError as error:         # it was ended in the middle, as Rust does where memory ends
        raise LlmoptError(f"{what}: takes more than {memory / 1e9:.1f} GB of memory, or fails") from error
    if "error" in found:
        raise LlmoptError(f"{what}: {found['error'] or f'takes more than {memory / 1e9:.1f} GB of memory'}")
    return found["value"]


def _wait(child: int) -> int:
    """The child's exit code, or minus the signal that ended it; it does not outlive an interruption."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


def _answer(act: Callable[[], Any], answer: BinaryIO, seconds: int, memory: int) -> None:
    """In the child: compute, write what came of it, and end without any of the parent's clearing up."""
    try:
        _limit(seconds, memory)
        found = {"value": act()}
    except MemoryError:
        found = {"error": ""}
    except BaseException as error:      # noqa: BLE001  a panic of Rust is no Exception
        found = {"error": fact_of(error)}
    try:
        answer.write(json.dumps(found).encode())
        answer.flush()
    finally:
        os._exit(0)


def _limit(seconds: int, memory: int) -> None:
    import resource

    faulthandler.disable()
    for number in (signal.SIGALRM, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(20 * seconds)          # of the clock: on a busy machine CPU time passes slowly
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):               # Rust tells of its panics there
        os.dup2(silence, stream)
    used = math.ceil(sum(os.times()[:2])) + 1
    _lower(resource, resource.RLIMIT_CPU, used + seconds)
    _lower(resource, resource.RLIMIT_AS, psutil.Process().memory_info().vms + memory)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"          # threads take address space


def _lower(resource: Any, kind: int, limit: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
