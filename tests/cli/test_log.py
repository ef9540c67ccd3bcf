"""What the command says while it works: lines held back, progress with the time left, -v and -q."""
import io
import logging

import click
import pytest

from llmopt import progress
from llmopt.cli import log
from llmopt.progress import Spoken, numbered, time_left


@pytest.fixture
def clock(monkeypatch):
    """Both clocks, set by hand: clock[0]."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    return now


def record(text, level=logging.INFO):
    return logging.LogRecord("llmopt", level, "", 0, text, (), None)


def test_lines_wait_until_a_run_lasts(clock):
    stream = io.StringIO()
    lines = log.Lines(stream)
    lines.emit(record("one"))
    assert stream.getvalue() == ""
    clock[0] = log.PATIENCE
    lines.emit(record("two\nlines"))
    lines.emit(record("three"))
    assert stream.getvalue() == "one\ntwo lines\nthree\n"


def test_a_warning_does_not_wait(clock):
    stream = io.StringIO()
    log.Lines(stream).emit(record("mind", logging.WARNING))
    assert stream.getvalue() == "mind\n"


def test_what_was_held_back_is_said_at_a_good_end_and_not_beside_an_error(capfd):
    with log.talking(aloud=True):
        log.LOG.info("calibrated")
        log.LOG.debug("a detail")
    assert capfd.readouterr().err == "calibrated\n"
    with pytest.raises(ZeroDivisionError), log.talking(aloud=True):
        log.LOG.info("calibrated")
        raise ZeroDivisionError
    with log.talking(aloud=False):
        log.LOG.info("another process")
    assert capfd.readouterr().err == ""
    assert not log.LOG.handlers


def test_a_slow_loop_tells_how_far_it_is(clock, caplog):
    caplog.set_level(logging.INFO, logger="llmopt")
    for _ in numbered(Spoken(), "step 2 of 3")(range(4), "quant.gptq"):
        clock[0] += 39
    assert [r.getMessage() for r in caplog.records] == [
        "step 2 of 3: quant.gptq: 1 of 4, 39.0 s, about 2 min left",
        "step 2 of 3: quant.gptq: 2 of 4, 1 min, about 1 min left",
        "step 2 of 3: quant.gptq: 3 of 4, 2 min, about 39.0 s left"]
    caplog.clear()
    for _ in Spoken()(range(9), "quick"):
        clock[0] += 1
    assert not caplog.records


@pytest.mark.parametrize(("done", "seconds", "says"), [(0, 12, "12.0 s"), (1, 39, "39.0 s, about 19 min left"),
                                                       (30, 70, "1 min")])
def test_time_left_is_an_estimate_from_all_items(done, seconds, says):
    assert time_left(done, 30, seconds) == says


@pytest.mark.parametrize(("flags", "level"), [(["-q"], logging.WARNING), (["-v"], logging.DEBUG), ([], logging.INFO),
                                              (["--quiet"], logging.WARNING)])
def test_flags_set_the_level(flags, level, caplog):
    caplog.set_level(logging.INFO, "llmopt")            # and back to what it was
    log.verbosity(click.Command("work", callback=lambda: None)).main(flags, standalone_mode=False)
    assert log.LOG.level == level
