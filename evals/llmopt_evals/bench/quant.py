"""`llmopt bench quant`: quantizers beside each other on one model: distance to the dense model, bytes, CPU seconds.

Ours and, where asked for, those of other tools in environments of their own (llmopt_evals/peers): the same token ids
for all, a process for each, one after the other. CPU seconds of the process are those of all its threads with imports,
loading and saving; of the solver, those of calibration and solving. The distance is `fidelity`'s, in float32, on rows
of the calibration's source that no tool has seen.
"""
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from llmopt.errors import LlmoptError, naming
from llmopt.files.packaged import REFERENCE
from llmopt.model.loading import check_dense, resolve
from llmopt.parts import build, get
from llmopt.progress import Progress
from llmopt.specs import DataSpec, ModelSpec
from llmopt_evals import fidelity
from llmopt_evals.bench.rows import rows_of
from llmopt_evals.entries import read
from llmopt_evals.large import opened
from llmopt_evals.peers.job import Job
from llmopt_evals.peers.launch import OURS, Done, Failed, Tool, carried_out

PLAIN = "signed: false, search: weights, sweeps: 0, targets: weights, residual: false, damping: 0.01"
METHODS = {"rounding, range as it is": "quant.rtn: {clip: false}",
           "rounding": "quant.rtn",
           "GPTQ, columns in order": f"quant.gptq: {{{PLAIN}, act_order: false}}",
           "GPTQ, plain": f"quant.gptq: {{{PLAIN}}}",
           "quant.gptq": "quant.gptq"}


@dataclass(frozen=True)
class Plan:
    """The measurements to make. methods: {name: entry of a recipe's `steps`}; rows: that are scored.

    keep: a folder for checkpoints and answers, where a later run finds what is done already.
    """

    model: str = REFERENCE
    methods: tuple[tuple[str, str], ...] = tuple(METHODS.items())
    bits: tuple[int, ...] = (4, 3, 2)
    group_sizes: tuple[int, ...] = (32,)
    data: DataSpec = DataSpec(name="self", samples=48, length=192)      # noqa: RUF009  frozen
    rows: int = 64
    peers: tuple[Tool, ...] = ()
    iterations: int = 200
    keep: Path | None = None

    def quick(self) -> "Plan":
        """Little data, one width, few iterations."""
        return replace(self, bits=self.bits[:1], group_sizes=self.group_sizes[:1], rows=min(self.rows, 8),
                       data=replace(self.data, samples=8, length=64), iterations=10)


@dataclass(frozen=True)
class Entry:
    """A line of the table: who does it, under which name, at how many bits in groups of how many columns."""

    tool: Tool
    name: str
    bits: int | float
    group_size: int
    steps: list[dict[str, Any]]

    def job(self, plan: Plan, ids: Path) -> Job:
        """What the tool is asked."""
        iterations = 0 if self.tool.name == OURS else plan.iterations
        return Job(resolve(plan.model), str(ids), self.bits, self.group_size, iterations=iterations,
                   seed=plan.data.seed, steps=self.steps)


def measure(plan: Plan, progress: Progress) -> dict[str, Any]:
    """All figures, ready for JSON."""
    spec, todo = ModelSpec(id=plan.model, compute_dtype="float32"), entries(plan)
    check_dense(spec)
    with TemporaryDirectory(prefix="llmopt-bench-") as scratch:
        work = plan.keep or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        ids, held = rows_of(plan.model, plan.data, plan.data, plan.rows, work)
        with fidelity.reference(opened(spec, False), lambda *_: held, Path(scratch)) as against:
            rows = [row(entry, entry.job(plan, ids), work, against) for entry in progress(todo, "quantizers")]
        seen = len(ids.read_text().splitlines())
    return {"model": plan.model, "data": {"source": plan.data.name, "rows": seen, "tokens": plan.data.length,
                                          "scored_rows": plan.rows}, "rows": beside_the_best(rows)}


def entries(plan: Plan) -> list[Entry]:
    """Every method and peer at every setting; raises LlmoptError for entries that are none of quantization."""
    pairs = [(bits, size) for size in plan.group_sizes for bits in plan.bits]
    ours = [ours_of(name, word, *pair) for pair in pairs for name, word in plan.methods]
    once = {(entry.name, entry.bits, entry.group_size): entry for entry in ours}        # some say bits themselves
    return [*once.values(), *(Entry(tool, tool.name, *pair, []) for pair in pairs for tool in plan.peers)]


def ours_of(name: str, word: str, bits: int, group_size: int) -> Entry:
    """An entry of a recipe's `steps`, or a list of them; the last gets bits and group size if it says none."""
    steps = []
    with naming(word):
        for method, given in read(word):
            stage = get(method).stage
            if stage not in ("transform", "quant"):
                raise LlmoptError("quant.* expected, alone or after transform.*: this quantizes no weights")
            added = {"bits": bits, "group_size": group_size} if stage == "quant" and "scheme" not in given else {}
            steps.append({method: added | given})
            made = build(method, steps[-1][method])
        if stage != "quant":
            raise LlmoptError("quant.* expected behind it")
    return Entry(Tool(OURS), name, made.bits, made.group_size, steps)


def row(entry: Entry, job: Job, work: Path, against: fidelity.Against) -> dict[str, Any]:
    """The figures of one entry; of a peer that fails what it said, of ours an LlmoptError."""
    told = {"method": entry.name, "tool": entry.tool.name, "bits": entry.bits, "group_size": entry.group_size}
    try:
        done = carried_out(entry.tool, job, work)
    except Failed as failure:
        if entry.tool.name == OURS:
            raise LlmoptError(f"{entry.name} at {entry.bits} bits: {str(failure).removeprefix('error: ')}") from failure
        return told | {"failed": str(failure)}
    return told | figures(done, against)


def figures(done: Done, against: fidelity.Against) -> dict[str, Any]:
    """What a finished job has cost and is worth."""
    scored = against(opened(ModelSpec(id=done.loadable, compute_dtype="float32"), False))
    kl, error = fidelity.over_rows([one.kl for one in scored])
    agreement, _ = fidelity.over_rows([one.agrees for one in scored])
    return {"kl": kl, "kl_stderr": error, "kl_rows": [float(one.kl.mean()) for one in scored],
            "agreement": agreement, "bytes": done.bytes, "cpu_process": done.process, "cpu_solver": done.job.solver,
            "versions": done.job.versions}


def beside_the_best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with what each is farther from the dense model than the nearest at as many bits in as large groups.

    Over the same tokens, row by row: the standard error of this difference is far below those of the two distances.
    """
    scored = [row for row in rows if "kl" in row]
    for told in scored:
        alike = [row for row in scored if (row["bits"], row["group_size"]) == (told["bits"], told["group_size"])]
        mine, best = (torch.tensor(row["kl_rows"], dtype=torch.float64)
                      for row in (told, min(alike, key=lambda row: row["kl"])))
        told["beyond"], told["beyond_stderr"] = fidelity.over_rows(list((mine - best)[:, None]))
    return rows
