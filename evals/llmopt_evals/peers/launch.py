"""Starts the scripts of this folder: each in its own environment, with what it cost the processor."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from llmopt.errors import LlmoptError, nearest
from llmopt.files.shards import written_bytes
from llmopt_evals.peers.job import Job

HERE = Path(__file__).parent
OURS = "llmopt"
QUANTIZERS = {"llmcompressor": "llmcompressor", "gptqmodel": "gptqmodel", "autoround": "auto-round"}   # their packages
PRUNERS = {"torchpruning": "torch-pruning"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Tool(NamedTuple):
    """A script of this folder with the Python that runs it."""

    name: str
    python: str = sys.executable

    @property
    def environment(self) -> dict[str, str]:
        """A peer's packages are its own; ours are where this process has found them."""
        found = os.environ | OFFLINE | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if self.name != OURS:
            found.pop("PYTHONPATH", None)
        return found


class Done(NamedTuple):
    """A finished job: its answer, the CPU seconds of the whole process, and the bytes of the checkpoint."""

    job: Job
    process: float
    bytes: int

    @property
    def loadable(self) -> str:
        """The folder to score."""
        return self.job.plain or self.job.out


class Failed(Exception):
    """A tool could not do its job; the text is the last thing that it said."""


def peer(word: str, packages: dict[str, str]) -> Tool:
    """The tool of NAME=PYTHON; raises LlmoptError for another name, and an environment without the package."""
    name, _, python = word.partition("=")
    if name not in packages or not python:
        raise LlmoptError(f"--peer: {word!r} given, NAME=PYTHON expected with the Python of its environment; names are "
                          f"{', '.join(packages)}{nearest(name, packages)}")
    ask = f"from importlib.metadata import version; version({packages[name]!r})"
    try:
        has = not subprocess.run([python, "-c", ask], capture_output=True, timeout=60).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LlmoptError(f"--peer {word}: {python} cannot be run ({error})") from error
    if not has:
        raise LlmoptError(f"--peer {word}: there is no {packages[name]} in it; {python} -m pip install "
                          f"{packages[name]}")
    return Tool(name, python)


def carried_out(tool: Tool, job: Job, work: Path) -> Done:
    """Do a job in a process of its own, unless `work` holds the answer to this very job from earlier.

    Its `out` is a folder in `work`. Raises Failed with what the tool said last.
    """
    digest = hashlib.sha256(json.dumps(asdict(job)).encode()).hexdigest()[:8]
    place = work / f"{tool.name}-{digest}"
    answer = Path(f"{place}.json")
    if not answer.is_file():
        shutil.rmtree(place, ignore_errors=True)                    # of a run that was cut off
        asked, log = Path(f"{place}.asked.json"), Path(f"{place}.log")
        asked.write_text(json.dumps(asdict(replace(job, out=str(place)))))
        seconds, code = _run([tool.python, str(HERE / f"with_{tool.name}.py"), str(asked)], tool.environment, log)
        if code:
            raise Failed(_last(log))
        answer.write_text(json.dumps({"job": json.loads(asked.read_text()), "process": seconds}))
        asked.unlink()
    known = json.loads(answer.read_text())
    return Done(Job(**known["job"]), known["process"], written_bytes(place))


def _run(line: list[str], environment: dict[str, str], log: Path) -> tuple[float, int]:
    """(CPU seconds of the process and its children, exit code); what it says goes into a file."""
    with log.open("wb") as said, subprocess.Popen(line, env=environment, stdout=said, stderr=said) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime, process.returncode


def _last(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
