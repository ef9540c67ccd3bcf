"""`llmopt bench prune`: pruners beside each other on one model: nats a token added, parameters left, CPU seconds.

Ours in this process, one after the other, each on the model as it was; other tools, where asked for, in environments
of their own (llmopt_evals/peers). The same token ids for all. What is added is the negative log-likelihood of the
pruned model less that of the dense one, over the same tokens; its standard error (over rows) is that of the difference.
CPU seconds are those of deciding, cutting and refitting, in all threads.
"""
import gc
import hashlib
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

import llmopt
from llmopt.calibration.data import Batch, as_batches, fingerprint
from llmopt.errors import LlmoptError, naming
from llmopt.files.packaged import REFERENCE
from llmopt.model.computing import choose
from llmopt.model.loading import check_dense, load_dense, resolve
from llmopt.parts import build, fields_of, get
from llmopt.progress import Progress
from llmopt.runtime.compression import EXPERTS
from llmopt.specs import DataSpec, ModelSpec
from llmopt_evals import fidelity
from llmopt_evals.bench.rows import rows_of
from llmopt_evals.entries import read
from llmopt_evals.large import opened
from llmopt_evals.peers.job import Job
from llmopt_evals.peers.launch import Failed, Tool, carried_out

CRITERIA = ("wanda", "obs", "flap", "magnitude")
METHODS = tuple(f"prune.{name}: {{refit: {refit}}}" for name in CRITERIA for refit in ("true", "false"))
Answer = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The measurements to make. methods: entries of a recipe's `steps`, or lists of them, experts.* too, which leave
    the weights as they are; ratios and units: of those that do not say.

    scored: where the rows that are scored come from. peers: prune FFN channels. keep: a folder for what is measured,
    where a later run finds it.
    """

    model: str = REFERENCE
    methods: tuple[str, ...] = METHODS
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3)
    units: tuple[str, ...] = ("ffn",)
    data: DataSpec = DataSpec(name="self", samples=48, length=192)      # noqa: RUF009  frozen
    scored: DataSpec | None = None
    rows: int = 64
    peers: tuple[Tool, ...] = ()
    keep: Path | None = None

    def quick(self) -> "Plan":
        """Little data, the last of the ratios."""
        return replace(self, ratios=self.ratios[-1:], rows=min(self.rows, 8),
                       data=replace(self.data, samples=8, length=64))


@dataclass(frozen=True)
class Entry:
    """A line of the table: steps of ours, or a tool that takes a share of the FFN channels."""

    name: str
    ratio: float
    steps: tuple[dict[str, Any], ...] = ()
    tool: Tool | None = None


def measure(plan: Plan, progress: Progress) -> dict[str, Any]:
    """All figures, ready for JSON."""
    spec, todo = ModelSpec(id=plan.model, compute_dtype="float32"), entries(plan)
    check_dense(spec)
    with TemporaryDirectory(prefix="llmopt-bench-") as scratch:
        work = plan.keep or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        ids, held = rows_of(plan.model, plan.data, plan.scored or plan.data, plan.rows, work)
        key = [plan.model, ids.name, fingerprint(held), plan.data.seed]
        with fidelity.reference(opened(spec, False), lambda *_: held, Path(scratch)) as against:
            rows = [_kept(work, [*key, repr(entry)], lambda entry=entry: _row(entry, plan, ids, work, against))
                    for entry in progress(todo, "pruners")]
        seen = len(ids.read_text().splitlines())
    return {"model": plan.model, "rows": rows, "data": {
        "source": plan.data.path or plan.data.name, "rows": seen, "tokens": plan.data.length,
        "scored": (plan.scored or plan.data).path or (plan.scored or plan.data).name, "scored_rows": plan.rows}}


def entries(plan: Plan) -> list[Entry]:
    """Every method and peer at every ratio, once; raises LlmoptError for entries that prune nothing."""
    ours = [ours_of(word, ratio, plan.units) for ratio in plan.ratios for word in plan.methods]
    theirs = [Entry(tool.name, ratio, tool=tool) for ratio in plan.ratios for tool in plan.peers]
    return list({(entry.name, repr(entry.steps), entry.ratio): entry for entry in [*ours, *theirs]}.values())


def ours_of(word: str, ratio: float, units: tuple[str, ...]) -> Entry:
    """An entry of a recipe's `steps`, or a list of them; those that prune get ratio and units if they say none.

    experts.top_k counts under the ratio that it stands beside.
    """
    steps, ratios = [], []
    with naming(word):
        for name, given in read(word):
            kind = get(name)
            if kind.stage not in ("score", "prune") and kind.place != EXPERTS:
                raise LlmoptError("prune.* expected, alone or after heads.*, or experts.*")
            known = fields_of(kind)
            open_ = {"ratio": ratio, "units": list(units)}
            steps.append({name: {key: value for key, value in open_.items() if key in known} | given})
            made = build(name, steps[-1][name])
            if "ratio" in known and kind.stage != "score" or kind.place == EXPERTS:
                ratios.append(made.ratio if "ratio" in known else ratio)
        if not ratios:
            raise LlmoptError("prune.* with a ratio expected")
    return Entry(word, ratios[0], tuple(steps))


def _kept(work: Path, key: list[str], make: Callable[[], Answer]) -> Answer:
    """What `make` has measured, now or in an earlier run with this folder."""
    file = work / f"row-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}.json"
    if not file.is_file():
        file.write_text(json.dumps(make()))
    return json.loads(file.read_text())


def _row(entry: Entry, plan: Plan, ids: Path, work: Path, against: fidelity.Against) -> Answer:
    """The figures of one entry; of one that failed what it said."""
    told: Answer = {"method": entry.name, "tool": entry.tool.name if entry.tool else "llmopt", "ratio": entry.ratio}
    try:
        return told | (_theirs if entry.tool else _ours)(entry, plan, ids, work, against)
    except (LlmoptError, Failed) as failure:
        return told | {"failed": str(failure)}
    finally:
        gc.collect()


def _ours(entry: Entry, plan: Plan, ids: Path, work: Path, against: fidelity.Against) -> Answer:
    model, tokenizer = load_dense(ModelSpec(id=plan.model))
    choose(model, "float32", "cpu")
    before, start = model.num_parameters(), time.process_time()
    llmopt.compress(model, list(entry.steps), _rows(ids, plan, model), plan.data.seed, tokenizer=tokenizer)
    seconds = time.process_time() - start
    return _figures(model, before, seconds, against(nullcontext((model, tokenizer))))


def _rows(ids: Path, plan: Plan, model: nn.Module) -> list[Batch]:
    return as_batches([json.loads(line) for line in ids.read_text().splitlines()], model.config.vocab_size,
                      plan.data.batch_size)


def _theirs(entry: Entry, plan: Plan, ids: Path, work: Path, against: fidelity.Against) -> Answer:
    done = carried_out(entry.tool, Job(resolve(plan.model), str(ids), ratio=entry.ratio, seed=plan.data.seed), work)
    with opened(ModelSpec(id=plan.model), False) as (model, _):
        before = model.num_parameters()
    with opened(ModelSpec(id=done.loadable, compute_dtype="float32"), False) as (model, words):
        return _figures(model, before, done.job.solver, against(nullcontext((model, words)))) | {
            "versions": done.job.versions}


def _figures(model: nn.Module, before: int, seconds: float, scored: list[fidelity.Row]) -> Answer:
    _, found = fidelity.figures(scored)
    (change, error), kl = found["loglikelihood_change"], found["kl"]
    return {"nats": -change, "nats_stderr": error, "kl": kl[0], "kl_stderr": kl[1], "agreement": found["agreement"][0],
            "perplexity": found["perplexity"][0], "parameters": model.num_parameters(), "parameters_before": before,
            "cpu": seconds}
