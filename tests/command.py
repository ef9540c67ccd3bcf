"""The `llmopt` command for tests: as a process of its own, cold or warm, or in this one where only its words matter."""
import os
import subprocess
import sys
from pathlib import Path

from llmopt.cli.commands import main
from tests import warm

ROOT = Path(__file__).parents[1]


def command(*words: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    """(command line, environment) of the installed script's body."""
    path = os.pathsep.join(str(ROOT / p) for p in (".", "kernels", "evals"))
    start = "from llmopt_evals.start import main; main()"
    return ([sys.executable, "-c", start, *map(str, words)],
            os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment)


def llmopt(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the command in a warm process; one that is given an environment starts cold."""
    line, variables = command(*words, **environment)
    if not environment:
        return warm.run(*line[1:], env=variables)
    return subprocess.run(line, env=variables, capture_output=True, text=True, timeout=1200)


def call(monkeypatch, *words: str) -> int:
    """Run the command in this process, six seconds of imports cheaper; its exit code."""
    monkeypatch.setattr(sys, "argv", ["llmopt", *map(str, words)])
    try:
        main()
    except SystemExit as leave:
        return leave.code
    raise AssertionError("the command came back without an exit code")


def torchrun(*words: str, count: int = 2, **environment: str) -> tuple[list[str], dict[str, str]]:
    """(command line, environment) of several processes, on a port of their own; words: a script, or -m MODULE."""
    _, variables = command(**environment)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [sys.executable, *launch, *map(str, words)], variables
