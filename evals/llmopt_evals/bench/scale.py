"""`llmopt bench scale`: memory, time and the journal's cost against the number of blocks; two processes against one.

Every figure comes from a real `llmopt compress --stream` in a process of its own, on checkpoints with random weights of
true shapes. Memory is looked at from outside, as private pages of the whole process tree (llmopt/scale/gauge.py), above
what a process takes that has done no more than import the same modules. Ratios are those of one run on one machine.
"""
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch

from llmopt.errors import LlmoptError, nearest
from llmopt.files.shards import written_bytes
from llmopt.progress import Progress
from llmopt.scale.gauge import EVERY, Taken, taken
from llmopt_evals.synthetic import SHAPES, shape_of, write

IMPORTS = "import sys, llmopt, llmopt.run.dry_run; print(flush=True); sys.stdin.read()"
RTN = "steps: [quant.rtn: {bits: 4}]\n"
GPTQ = "data: {{name: ids, path: {ids}}}\nsteps: [quant.gptq: {{bits: 4}}]\n"
JOURNAL = "of which for the journal"
NEWBORN = 10                # looks at the memory between two searches for new processes


@dataclass(frozen=True)
class Plan:
    """The measurements to make. recipe: a file, None for RTN. solve: the shape for GPTQ in one and two processes."""

    shape: str = "qwen3-0.6b"
    blocks: tuple[int, ...] = (4, 8, 16, 32)
    recipe: str | None = None
    solve: str = "llama-1b"
    rows: int = 8               # of calibration data for GPTQ
    length: int = 512
    repeats: int = 2            # of the solve: the faster run counts

    def __post_init__(self) -> None:
        for name in (self.shape, self.solve):
            if name not in SHAPES:
                raise LlmoptError(f"there is no shape {name!r}{nearest(name, SHAPES)}")


QUICK = Plan(blocks=(1, 2), solve="qwen3-0.6b", rows=2, length=64, repeats=1)


@dataclass
class Ran:
    """One run: the command without its temporary folder, bytes at the peak, and the seconds that its log tells."""

    command: str
    peak: Taken
    seconds: dict[str, float]

    @property
    def of_steps(self) -> float:
        return sum(value for part, value in self.seconds.items() if part.startswith("steps."))


@dataclass
class Figures:
    """memory: a row for each number of blocks. processes: seconds for a block of one and of two; their ratio."""

    memory: list[dict] = field(default_factory=list)
    processes: dict = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)           # each model by synthetic.write


def measure(plan: Plan, progress: Progress) -> dict:
    """All figures, ready for JSON."""
    found = Figures()
    base = imported()
    with TemporaryDirectory(prefix="llmopt-bench-") as folder:
        work = Path(folder)
        (work / "rtn.yaml").write_text(RTN)
        for count in progress(plan.blocks, "blocks"):
            model = _checkpoint(work, plan.shape, count)
            ran = compress(work, ["--recipe", plan.recipe or str(work / "rtn.yaml"), "--model", str(model)])
            found.memory.append(_row(count, written_bytes(model), ran, base))
            found.commands.append(ran.command)
        words = _solving(work, plan)
        one, two = (min((compress(work, words, processes) for _ in range(plan.repeats)), key=attrgetter("of_steps"))
                    for processes in (1, 2))
        found.processes = {"shape": plan.solve, "one": one.of_steps, "two": two.of_steps,
                           "ratio": one.of_steps / two.of_steps}
        found.commands += [one.command, two.command]
    return asdict(found)


def _row(count: int, size: int, ran: Ran, base: Taken) -> dict:
    peak = ran.peak.above(base)
    return {"blocks": count, "model_bytes": size, "peak_private": peak.private, "peak_mapped": peak.mapped,
            "seconds_per_block": ran.of_steps / count, "journal": ran.seconds[JOURNAL] / ran.seconds["total"]}


def _checkpoint(work: Path, shape: str, blocks: int) -> Path:
    """A checkpoint of a shape with so many blocks; the one before is in nobody's way any more."""
    for old in work.glob("model-*"):
        shutil.rmtree(old)
    folder = work / f"model-{shape}-{blocks}"
    write(shape_of(shape, blocks), folder)
    return folder


def _solving(work: Path, plan: Plan) -> list[str]:
    """The words of a run that quantizes one block by GPTQ."""
    config, ids = shape_of(plan.solve, 1), work / "ids.jsonl"
    drawn = torch.randint(config.vocab_size, (plan.rows, plan.length), generator=torch.Generator().manual_seed(0))
    ids.write_text("".join(f"{row}\n" for row in drawn.tolist()))
    (work / "gptq.yaml").write_text(GPTQ.format(ids=ids))
    model = work / f"model-{plan.solve}-1"
    if not model.is_dir():
        _checkpoint(work, plan.solve, 1)
    return ["--recipe", str(work / "gptq.yaml"), "--model", str(model), "--max-blocks", "1"]


def compress(work: Path, words: list[str], processes: int = 1) -> Ran:
    """Run `llmopt compress` with one thread for each process; raises LlmoptError with what it said if it fails."""
    start = [] if processes == 1 else ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    with TemporaryDirectory(dir=work) as folder:
        line = [sys.executable, "-m", *start, "llmopt", "compress", *words, "--stream", "--no-eval",
                "--output", f"{folder}/out"]
        peak, code, said = watched(line)
        if code:
            raise LlmoptError(f"{shlex.join(line)}: {said}")
        log = Path(folder, "out", "llmopt.log").read_text()
    told = {what: float(seconds) for seconds, what in re.findall(r"^ *([\d.]+) s  (.*)$", log, re.MULTILINE)}
    shown = shlex.join(["python", *line[1:]]).replace(f"{folder}/", "").replace(f"{work}/", "")
    return Ran(f"OMP_NUM_THREADS=1 {shown}", peak, told)


def watched(line: list[str]) -> tuple[Taken, int, str]:
    """(peak of the process tree, exit code, what it said on stderr) of a command."""
    with subprocess.Popen(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE) as process:
        tree, peak, looks = Tree(psutil.Process(process.pid)), Taken(), 0
        while process.poll() is None:
            if looks % NEWBORN == 0:
                tree.look_around()
            peak, looks = max(peak, tree.taken()), looks + 1
            time.sleep(EVERY)
        return peak, process.returncode, process.stderr.read()


class Tree:
    """A process and those below it, found now and then: finding them takes as long as sixty looks at one."""

    def __init__(self, root: psutil.Process):
        self.root, self.members = root, [root]

    def look_around(self) -> None:
        with suppress(psutil.Error):                # it has just ended
            self.members = [self.root, *self.root.children(recursive=True)]

    def taken(self) -> Taken:
        """The memory of all processes together."""
        each = []
        for process in self.members:
            with suppress(psutil.Error):
                each.append(taken(process))
        return Taken(*map(sum, zip(*each, strict=True))) if each else Taken()


def imported() -> Taken:
    """The memory of a process that has only imported what the command imports."""
    with subprocess.Popen([sys.executable, "-c", IMPORTS], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        found = taken(psutil.Process(process.pid))
        process.stdin.close()
    return found
