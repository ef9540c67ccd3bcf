"""What the command says on stderr while it works: log lines, and how far each loop is.

The lines are those of Python's logger `llmopt`. `-q` leaves warnings and errors, `-v` adds details. Where stderr is no
terminal, lines are held back for the first PATIENCE seconds, so that a run that fails at once ends in its error alone.
"""
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import click

from llmopt.errors import one_line
from llmopt.progress import Progress, Spoken, silent

LOG = logging.getLogger("llmopt")
PATIENCE = 10       # seconds
LEVELS = {"-q": logging.WARNING, "": logging.INFO, "-v": logging.DEBUG}


def verbosity(command):
    """The options -v and -q, for a command or the group."""
    for name, level, text in (("verbose", "-v", "Say more."), ("quiet", "-q", "Say nothing but warnings and errors.")):
        command = click.option(f"--{name}", level, is_flag=True, expose_value=False, help=text, callback=_set)(command)
    return command


def _set(context: click.Context, option: click.Parameter, given: bool) -> None:
    if given:
        LOG.setLevel(LEVELS[min(option.opts, key=len)])


class Lines(logging.Handler):
    """Log records as lines of `stream`, held back until PATIENCE is over."""

    def __init__(self, stream: TextIO):
        super().__init__()
        self.stream, self.held, self.until = stream, [], time.monotonic() + PATIENCE

    def emit(self, record: logging.LogRecord) -> None:
        self.held.append(one_line(self.format(record)))
        if time.monotonic() >= self.until or record.levelno >= logging.WARNING:
            self.flush()

    def flush(self) -> None:
        """Write what was held back; a reader that has gone, or a terminal that was closed, does not end the run."""
        self.until = 0
        with suppress(OSError):
            for line in self.held:
                self.stream.write(line + "\n")
            self.stream.flush()
        self.held.clear()


class OnTerminal(logging.Handler):
    """Log records above the progress bars of a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        from llmopt.cli.tables import ERR

        style = "yellow" if record.levelno > logging.INFO else "dim"
        with suppress(OSError):                 # the terminal was closed, and the run goes on without it
            ERR.print(one_line(self.format(record)), style=style, markup=False)


def _own_stderr() -> TextIO:
    """Stderr as it is now, even while libraries that talk are led away from descriptor 2; nowhere if it is closed."""
    try:
        return os.fdopen(os.dup(2), "w", errors="backslashreplace")
    except OSError:
        return open(os.devnull, "w")


@contextmanager
def talking(aloud: bool) -> Iterator[None]:
    """Log records arrive on stderr inside; aloud: this process is the one that talks."""
    stream = _own_stderr()
    handler = OnTerminal() if stream.isatty() else Lines(stream)
    before = LOG.level
    LOG.setLevel(LEVELS["" if aloud else "-q"])
    LOG.addHandler(handler)
    try:
        yield
        handler.flush()
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(before)
        with suppress(OSError):                 # of what could not be written
            stream.close()


def told() -> None:
    """Write the lines that are held back: what a command prints in the end comes after them."""
    for handler in LOG.handlers:
        handler.flush()


@contextmanager
def progress() -> Iterator[Progress]:
    """A Progress for methods: bars on a terminal, lines elsewhere, nothing with -q."""
    from llmopt.cli.tables import ERR

    if not LOG.isEnabledFor(logging.INFO):
        yield silent
    elif ERR.is_terminal and ERR.file.isatty():         # FORCE_COLOR makes no terminal of a file
        from llmopt.cli.bars import bars

        with bars(ERR) as track:
            yield track
    else:
        yield Spoken()
