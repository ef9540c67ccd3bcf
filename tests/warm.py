"""Processes that start warm: children of one that has imported torch, transformers and lm-eval, but not llmopt.

`run` and `start` take the words behind `python` (-c CODE, -m MODULE or FILE, and arguments) and save six seconds of CPU
time each. What is read from the environment at the import of those libraries (HF_HOME, HF_ENDPOINT, PYTHONHASHSEED) is
the server's: a test that sets it, or is about starting, takes a process of its own.

python warm.py SOCKET is the server; it ends when its stdin is closed.
"""
import atexit
import contextlib
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from threading import RLock
from typing import NoReturn

import psutil

LIBRARIES = ("transformers.models.llama.modeling_llama", "compressed_tensors", "pydantic.dataclasses", "rich.progress",
             "lm_eval.evaluator", "lm_eval.tasks", "lm_eval.models.huggingface")
SERVERS: list[int] = []             # process ids; at most one


# ------------------------------------------------------------------------------------------------- the test's side

class Process:
    """A warm process that was started: what a test needs of subprocess.Popen. Its output goes to files."""

    def __init__(self, words: list[str], env: dict[str, str], cwd: Path | None, text: str):
        self.files = [tempfile.TemporaryFile("w+") for _ in range(4)]          # noqa: SIM115  they live as long as this
        self.files[0].write(text)
        json.dump({"words": [str(word) for word in words], "env": env, "cwd": str(cwd or os.getcwd())}, self.files[3])
        for file in self.files:
            file.seek(0)
        self.line = socket.socket(socket.AF_UNIX)
        self.line.connect(server())
        socket.send_fds(self.line, [b"job"], [file.fileno() for file in self.files])
        self.news = self.line.makefile()
        self.pid, self.returncode = int(self.news.readline()), None

    def poll(self) -> int | None:
        """The exit code (minus the signal that ended it), None while it runs."""
        if self.returncode is None and select.select([self.line], [], [], 0)[0]:
            self.returncode = int(self.news.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 1200) -> tuple[str, str]:
        """(stdout, stderr), once it has ended."""
        if self.returncode is None and not select.select([self.line], [], [], timeout)[0]:
            self.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        self.poll()
        out, err = self.files[1:3]
        out.seek(0)
        err.seek(0)
        return out.read(), err.read()


def start(*words: str, env: dict[str, str], cwd: Path | None = None, text: str = "") -> Process:
    """Start `python WORDS` in a copy of the warm process."""
    return Process(list(words), env, cwd, text)


def run(*words: str, env: dict[str, str], cwd: Path | None = None, text: str = "") -> subprocess.CompletedProcess:
    """`python WORDS`, to its end. text: what it finds on stdin."""
    process = start(*words, env=env, cwd=cwd, text=text)
    out, err = process.communicate()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def cpu_seconds() -> float:
    """What the server, while it lives, and all that it has started have taken."""
    return sum(sum(psutil.Process(number).cpu_times()[:4]) for number in SERVERS)


@functools.cache
def server() -> str:
    """The socket of this test process's server, which is started when it is first asked for."""
    folder = tempfile.TemporaryDirectory(prefix="llmopt-warm-")
    place = os.path.join(folder.name, "socket")
    variables = os.environ | {"HF_HOME": os.path.join(folder.name, "hf"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, __file__, place], env=variables, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    SERVERS.append(process.pid)
    atexit.register(folder.cleanup)
    atexit.register(process.communicate)
    return place


# ----------------------------------------------------------------------------------------------- the server's side

def serve(place: str) -> None:
    """Fork for each connection, until stdin is closed."""
    from importlib import import_module

    sys.path.pop(0)                         # this file's folder
    for name in LIBRARIES:
        import_module(name)
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)                # threads do not survive a fork
    tqdm.monitor_interval = 0
    tqdm.set_lock(RLock())                  # its own is a semaphore of all children, which a killed one takes with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, reap)
    with socket.create_server(place, family=socket.AF_UNIX) as listening:
        os.write(1, b"ready\n")
        while listening in select.select([listening, sys.stdin], [], [])[0]:
            line, _ = listening.accept()
            if os.fork() == 0:
                attend(line)
            line.close()


def reap(*signalled: object) -> None:
    """Take note of the children that have ended: from then on their CPU time counts as this process's."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def attend(line: socket.socket) -> NoReturn:
    """Start one job, tell its process id, and when it has ended its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, *_ = socket.recv_fds(line, 3, 4)
    child = os.fork()
    if child == 0:
        become(files)
    line.sendall(f"{child}\n".encode())
    line.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
    os._exit(0)


def become(files: list[int]) -> NoReturn:
    """Turn into the process that the job asks for, run it, and leave with its exit code."""
    with open(files[3], closefd=False) as file:
        job = json.load(file)
    for target, source in enumerate(files[:3]):
        os.dup2(source, target)
    os.closerange(3, 256)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(0), os.fdopen(1, "w"),
                                         os.fdopen(2, "w", buffering=1, errors="backslashreplace"))
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.path[:0] = [path for path in job["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os._exit(finish(job["words"]))


def finish(words: list[str]) -> int:
    """Run `python WORDS` and give its exit code, as Python itself would."""
    try:
        python(*words)
        return 0
    except SystemExit as leave:
        if leave.code is not None and not isinstance(leave.code, int):
            sys.stderr.write(f"{leave.code}\n")
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException as error:  # noqa: BLE001  there is nobody else to tell
        traceback.print_exc()
        return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def python(first: str, *rest: str) -> None:
    """The body of a fresh interpreter with these words behind its name."""
    if first == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
