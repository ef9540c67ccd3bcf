"""What the machine refuses or its user cannot wait for: no memory, no larger files, Ctrl-C again and again."""
import os
import resource
import signal
import subprocess
import time

import pytest

from llmopt.checkpoint import save as checkpoint
from llmopt.cli.interrupts import PATIENCE, patient
from tests import tiny
from tests.command import call, command

STEPS = "steps:\n  - quant.rtn: {bits: 8, group_size: 16}\n"


@pytest.fixture
def words(tmp_path):
    tiny.make("llama").save_pretrained(tmp_path / "m")
    (tmp_path / "r.yaml").write_text(STEPS)
    return ("compress", "--recipe", tmp_path / "r.yaml", "--model", tmp_path / "m", "--output", tmp_path / "out",
            "--no-eval")


@pytest.mark.parametrize(("error", "said"), [
    (MemoryError(), "error: out of memory; what is finished is kept in"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                  "80000000000 bytes."), "error: out of memory: [enforce fail"),
    (RecursionError("maximum recursion depth exceeded"), "error: a file is nested too deeply")])
def test_no_memory_is_one_line(words, tmp_path, monkeypatch, capsys, error, said):
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_provenance", fail)
        assert call(patch, *words) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(told) == 1
    assert told[0].startswith(said)
    assert not (tmp_path / "out").exists()
    assert call(monkeypatch, *words, "--resume") == 0           # nothing was lost


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_a_limit_on_the_size_of_files_is_one_line(words, tmp_path, monkeypatch, capsys, stream):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size, work in ((20_000, False), (100_000, True)):       # too small for a block, and for the output alone
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            assert call(monkeypatch, *words, stream, "--resume") == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(told) == 1
        assert "a file may not become as large as this (ulimit -f)" in told[0]
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "out.llmopt-work").exists() == work, told
    assert call(monkeypatch, *words, stream, "--resume") == 0


@pytest.fixture
def interruptible():
    """Ctrl-C reaches Python, also where the tests were started in the background by a shell that ignores it there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_does_not_end_the_clearing_up(monkeypatch):
    cleared = []
    with patient():
        with pytest.raises(KeyboardInterrupt):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                cleared.append(True)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + PATIENCE + 1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(.1)
    assert cleared
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.full
@pytest.mark.parametrize("wait", [1, 3, 5, 6, 7, 8])
def test_ctrl_c_twice_at_any_moment_leaves_no_traceback(words, tmp_path, wait):
    line, environment = command(*words)
    with subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(wait)
        for _ in range(4):
            process.send_signal(signal.SIGINT)
            time.sleep(.05)
        err = process.communicate(timeout=100)[1]
    assert process.returncode in (0, 130), err
    assert "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} - {"m", "r.yaml", "out", "out.llmopt-work"} == set()


class _Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
def test_a_ctrl_c_where_python_drops_exceptions_is_tried_again(capsys):
    with patient(), pytest.raises(KeyboardInterrupt):
        _Finalized()
        for _ in range(1000):
            time.sleep(.01)         # the second one wakes nobody up
    assert capsys.readouterr().err == ""
