"""Log lines and progress where there is no terminal, where one was closed, and in a notebook."""
import builtins
import io
import os
import pty
import sys
from contextlib import contextmanager

import pytest

from llmopt.cli import log, tables
from llmopt.progress import Spoken
from tests.command import call


@contextmanager
def standing_in(number: int, name: str, file: int):
    """The descriptor `file` as stdout or stderr, in Python and below it."""
    saved, before = os.dup(number), getattr(sys, name)
    os.dup2(file, number)
    setattr(sys, name, os.fdopen(os.dup(file), "w"))
    try:
        yield
    finally:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), getattr(sys, name).fileno())         # what could not be written
        getattr(sys, name).close()
        setattr(sys, name, before)
        os.dup2(saved, number)
        os.close(saved)


WORDS = ("eval", "llmopt/reference", "--tasks", "world_copy", "--limit", "2", "--json")        # which says what it does


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_a_run_survives_its_terminal_and_its_reader(monkeypatch, kind):
    ours, theirs = pty.openpty() if kind == "terminal" else os.pipe()
    with standing_in(2, "stderr", theirs):
        os.close(ours)                                  # what is written from here on fails
        os.close(theirs)
        monkeypatch.setattr(log, "PATIENCE", 0)
        with pytest.raises(OSError, match="error|Broken pipe"):
            os.write(2, b"x")
        assert call(monkeypatch, *WORDS) == 0


def test_who_reads_no_further_ends_the_command_in_silence(monkeypatch, capfd):
    ours, theirs = os.pipe()
    with standing_in(1, "stdout", theirs):
        os.close(ours)
        os.close(theirs)
        assert call(monkeypatch, "methods", "--json") == 1                 # click does it
    assert capfd.readouterr().err == ""


def test_in_a_notebook_tables_are_text_and_progress_is_lines(monkeypatch, capfd, caplog):
    caplog.set_level("INFO", "llmopt")
    shell = type("ZMQInteractiveShell", (), {})()               # what rich asks for, where neither IPython's display
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)      # nor ipywidgets are
    assert call(monkeypatch, "methods") == 0
    assert "quant.gptq" in capfd.readouterr().out
    with log.progress() as progress:
        assert isinstance(progress, Spoken)


def test_forced_colours_make_no_bars_in_a_file(monkeypatch, caplog):
    caplog.set_level("INFO", "llmopt")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(tables.ERR, "_force_terminal", True)                # as FORCE_COLOR does
    assert tables.ERR.is_terminal
    with log.progress() as progress:
        assert isinstance(progress, Spoken)
